"""Memory, communication and time of a config on given hardware, on paper; no weight is loaded.

The formulas count what the code keeps: `model/frozen.py` for what a live position leaves behind for backward,
`model/prefix.py` for keys and values, `model/lm_head.py` for logits, ZeRO-3 for what is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from tagllm.config import Quantization, RunConfig
from tagllm.data.batch import Batch
from tagllm.model.linear import PACK_UP_TO, FrozenLinear, cpu_multiplies_bf16
from tagllm.model.lm_head import chunk_bytes
from tagllm.model.prefix import POSITIONS_AT_ONCE, SCORE_BYTES, score_bytes
from tagllm.model.quantize import bytes_per_weight
from tagllm.train.deepspeed_settings import BUCKET_ELEMENTS

Placement = Literal["replicate", "shard in a node", "shard"]
FP32 = 4
BUCKET_BYTES = FP32 * BUCKET_ELEMENTS
"""DeepSpeed's buffers for gradients."""
ROOM = 0.9
"""Of the memory may be planned for; the rest is for the context, fragments and other formulas than these."""


class Shape(NamedTuple):
    """What of a backbone counts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    maps: list[tuple[int, int]]
    """(O, I) of every linear map of the decoder."""
    others: int
    """Weights of the decoder that are neither maps nor the embedding."""
    vocabulary: int
    embedding: int
    head: int
    """Weights of the LM head; 0 where it is the embedding."""
    dtype: torch.dtype
    quantize: Quantization

    @classmethod
    def of(cls, model: Any, quantize: Quantization) -> Shape:
        """Of a frozen-aware causal LM, with or without weights."""
        config, base = model.config.get_text_config(), model.base_model
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        maps = [m for m in base.modules() if isinstance(m, FrozenLinear)]
        of_maps = {id(m.weight) for m in maps}
        others = sum(p.numel() for p in base.parameters() if id(p) not in of_maps and p is not table)
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, heads, getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            [(m.out_features, m.in_features) for m in maps], others, table.shape[0], table.numel(),
            0 if head is table else head.numel(), table.dtype, quantize,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return torch.empty(0, dtype=self.dtype).element_size()

    @property
    def map_weights(self) -> int:
        return sum(height * width for height, width in self.maps)

    @property
    def parameters(self) -> int:
        return self.map_weights + self.others + self.embedding + self.head

    @property
    def weight_bytes(self) -> int:
        """Of the weights themselves, without scales."""
        whole = {"none": self.width, "int8": 1, "llm_int8": 1, "nf4": 0.5}[self.quantize] * self.map_weights
        return int(whole) + self.width * (self.others + self.embedding + self.head)

    @property
    def scale_bytes(self) -> int:
        kept = sum(bytes_per_weight(self.quantize, i, self.dtype) * o * i for o, i in self.maps)
        return int(kept) + self.width * (self.others + self.embedding + self.head) - self.weight_bytes


class Load(NamedTuple):
    """What a micro-batch asks of a rank."""

    live: int
    computed: int
    """Frozen positions, each distinct one once."""
    longest: int
    """Of the stretches that these are in."""
    key_places: int
    """Places for keys, pads included: of each row's own frozen and live positions, and of shared pieces."""
    labels: int
    scores: int
    """Of one attention head: queries times keys."""
    own_rows: int = 0
    own_longest: int = 0
    shared_keys: int = 0
    """Rows with frozen positions of their own behind shared ones, the most of these, and of those."""

    @classmethod
    def of(cls, batch: Batch) -> Load:
        rows, longest = len(batch.live.lengths), max(batch.live.lengths)
        shared = [p for p in batch.pieces.placements if max(p.piece_B) >= 0]
        short = [p for p in shared if batch.is_short(p)] if sum(batch.own.lengths) else []
        piece = batch.pieces.tokens.lengths
        own = max(
            n + sum(piece[p.piece_B[b]] for p in short if p.piece_B[b] >= 0) for b, n in enumerate(batch.own.lengths)
        )
        shared_keys = sum(max(piece[i] for i in p.piece_B if i >= 0) for p in shared)
        apart = [len(set(p.piece_B) - {-1}) * max(piece) for p in shared if p not in short]
        seen = own + longest + sum(max(piece) for p in shared if p not in short)
        return cls(
            sum(batch.live.lengths), sum(piece) + sum(batch.own.lengths), max([*piece, *batch.own.lengths]),
            rows * (own + longest) + sum(apart), int((batch.label_term_M >= 0).sum()), rows * longest * seen,
            sum(n > 0 for n in batch.own.lengths), max(batch.own.lengths, default=0), shared_keys,
        )  # fmt: skip


class Hardware(NamedTuple):
    gpus: int
    per_node: int
    memory_gib: float
    node_gbs: float = 300
    """Gigabytes per second that a rank can send inside its node, and between nodes."""
    network_gbs: float = 25
    tflops: float = 300
    """Sustained, of a rank."""

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def placements(config: RunConfig, hardware: Hardware) -> list[Placement]:
    """What `train` may take, in the order of how little it sends."""
    ways: list[Placement] = ["replicate"]
    ways += ["shard in a node"] if 1 < hardware.per_node < hardware.gpus else []
    return ways + (["shard"] if config.engine.shard_over == "world" or hardware.nodes == 1 else [])


class Estimate(NamedTuple):
    """Of one rank: bytes by kind, bytes sent per step, FLOPs per step."""

    placement: Placement
    memory: dict[str, int]
    sent: int
    flops: float

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def seconds(self, hardware: Hardware) -> tuple[float, float]:
        """Computing and sending, one after the other."""
        inside = hardware.nodes == 1 or self.placement == "shard in a node"
        rate = hardware.node_gbs if inside else hardware.network_gbs
        return self.flops / (hardware.tflops * 1e12), self.sent / (rate * 1e9)


def estimate(
    shape: Shape, loads: Sequence[Load], learned: int, config: RunConfig, hardware: Hardware, placement: Placement,
    cuda: bool = True,
) -> Estimate:  # fmt: skip
    """For a step of `loads` on each rank; `learned` numbers are trained."""
    parts = {"replicate": 1, "shard in a node": min(hardware.per_node, hardware.gpus), "shard": hardware.gpus}[
        placement
    ]
    largest = max(loads, key=lambda load: kept_per_live(shape) * load.live + load.key_places)
    per_key = 2 * shape.layers * shape.kv_heads * shape.head_size * (shape.width if cuda else FP32)
    device, host = config.remembered_bytes if placement == "replicate" else (0, 0)
    of_layer = (shape.weight_bytes + shape.scale_bytes) // shape.layers
    in_few = not cuda and placement == "replicate" and config.remembers
    computed = min(largest.computed, max(POSITIONS_AT_ONCE, largest.longest)) if in_few else largest.computed
    at_once = max(largest.live, computed)
    kept = kept_per_live(shape) + kept_by_plain_attention(shape) * (cuda and not largest.computed)
    work = at_once * (4 * shape.hidden + 3 * shape.mlp) * FP32
    copies = shape.width * (shape.map_weights * (shape.quantize == "none") + (shape.head or shape.embedding))
    rounds = not cuda and shape.dtype == torch.bfloat16
    multiplies = cpu_multiplies_bf16()
    packs = rounds and multiplies and parts == 1 and copies <= PACK_UP_TO
    cast = [height * width for height, width in shape.maps]
    cast += [shape.head or shape.embedding] * (largest.labels > 0 and not multiplies)
    scores_of_row = score_bytes(shape.heads, largest.own_longest, largest.shared_keys) * (largest.shared_keys > 0)
    scores_of_prefix = scores_of_row * largest.own_rows
    if placement == "replicate" and config.remembers:
        scores_of_prefix = min(scores_of_prefix, max(SCORE_BYTES, scores_of_row))
    layers = max((len(tag.head.layers) for tag in config.tags.values() if tag.head), default=0)
    memory = {
        "weights": shape.weight_bytes // parts,
        "packed copy of weights": copies * packs,
        "scales": shape.scale_bytes // parts,
        "gathered weights": 0 if parts == 1 else of_layer + shape.embedding * shape.width,
        "kept for backward": kept * largest.live,
        "prefix keys and values": per_key * largest.key_places,
        "work of one layer": work + 3 * max(shape.heads * largest.scores * FP32, scores_of_prefix * cuda),
        "a map in fp32": FP32 * max(cast, default=0) * rounds,
        "states of chosen layers": FP32 * shape.hidden * layers * at_once,
        "logits": 3 * min(chunk_bytes(cuda), FP32 * largest.labels * shape.vocabulary),
        "remembered prefixes": device if cuda else host,
        "learned rows, moments, buffers": 4 * FP32 * learned + 2 * BUCKET_BYTES,
    }
    others = hardware.gpus - 1
    sent = int(2 * FP32 * learned * others / hardware.gpus)
    if parts > 1:  # the prefix pass, the live one and its backward gather every weight; pieces have a pass of their own
        passes = (4 if config.remembers or any(s.group_by for s in config.data.sources) else 3) * len(loads)
        sent += int(passes * (shape.weight_bytes + shape.scale_bytes) * (parts - 1) / parts)
    return Estimate(placement, memory, sent, sum(_flops(shape, load) for load in loads))


def kept_per_live(shape: Shape) -> int:
    """Bytes that one live position leaves behind for backward: per layer the input of both norms and their scale, the
    queries, and the MLP's two factors; the last norm's input; a gradient where the LM head is asked."""
    of_layer = 2 * (shape.hidden * shape.width + FP32) + shape.heads * shape.head_size * FP32
    of_layer += 2 * shape.mlp * shape.width
    return shape.layers * of_layer + shape.hidden * shape.width + FP32


def kept_by_plain_attention(shape: Shape) -> int:
    """Bytes more where a row has nothing frozen in front, so that a kernel of torch's computes its attention: on CUDA
    it keeps keys and values of all heads and what comes out."""
    return 3 * shape.layers * shape.heads * shape.head_size * FP32


def _flops(shape: Shape, load: Load) -> float:
    """2 N for a frozen position, 4 N for a live one (no gradient of weights), 4 V D for a label, and attention."""
    weights = shape.map_weights
    attention = 12.0 * shape.layers * shape.heads * shape.head_size * load.scores
    head = shape.head or shape.embedding
    return 2.0 * weights * load.computed + 4.0 * weights * load.live + 4.0 * head * load.labels + attention


def choose(estimates: Sequence[Estimate], hardware: Hardware) -> tuple[Estimate | None, str]:
    """The first that fits, in the order of how little it sends, and why."""
    limit = ROOM * hardware.memory_gib * 2**30
    for found in estimates:
        if found.total <= limit:
            rest = f"{found.total / 2**30:.1f} of {hardware.memory_gib:g} GiB"
            before = [e.placement for e in estimates[: estimates.index(found)]]
            why = f"{', '.join(before)} would not fit" if before else "every rank can hold the whole backbone"
            return found, f"{found.placement}: {rest}; {why}"
    least = min(estimates, key=lambda e: e.total)
    return None, (
        f"nothing fits: {least.placement} needs {least.total / 2**30:.1f} GiB of {hardware.memory_gib:g}. Take "
        "backbone.quantize=nf4, a smaller optim.rows_per_micro_batch, or more GPUs."
    )
