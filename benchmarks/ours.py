"""tagllm itself: full backward, frozen prefix, shared prefix, remembered prefix; without the engine (one process)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contestant import HEAD_LR, TAG_LR, LoopContestant
from benchmarks.models import Models
from benchmarks.workloads import Row, Step, Workload
from tagllm.data.batch import Batch, Counts, count, in_chunks
from tagllm.model.loss import total
from tagllm.model.prefix import PrefixMemory
from tagllm.model.tagged import TaggedModel
from tagllm.train.work import work_of


class Kind(NamedTuple):
    """Which of the ideas are on; each builds on those before."""

    frozen: bool = True
    shared: bool = True
    remembers: bool = False
    seen_before: bool = False


class Ours(LoopContestant[Batch]):
    """Rows -> micro-batches -> counts -> backward each -> one step, as `tagllm.train.loop` has it."""

    uses_tagged_backbone = True

    def __init__(self, letter: str, label: str, kind: Kind) -> None:
        self.letter, self.label, self.kind = letter, label, kind

    def setup(self, workload: Workload, models: Models) -> None:
        backbone, self.device = models.tagged, models.settings.device
        self.weights = workload.stage.weights
        self.budgets = workload.stage.config.remembered_bytes  # a user's defaults
        reads_tokens = bool(self.weights.span or self.weights.output)
        self.module = self.model = TaggedModel(
            backbone.model, workload.tags, workload.layout, None, reads_tokens, backbone.attention
        ).to(self.device)
        # `sharded` leaves out what merely happens to be alike, and without groups that is everything
        self.collate = workload.stage.collator(workload.layout, free_spans=False)._replace(
            frozen_prefix=self.kind.frozen, sharded=not self.kind.shared, grouped=self.kind.shared
        )

    def run(self, steps: Sequence[Step], rows_per_micro_batch: int) -> list[float]:
        if self.kind.remembers:
            self.model.memory = PrefixMemory(*self.budgets)
        if self.kind.seen_before:
            super().run(steps, rows_per_micro_batch)
        return super().run(steps, rows_per_micro_batch)

    def batches(self, rows: Step, rows_per_micro_batch: int) -> list[Batch]:
        examples = [row.example for row in rows]
        if not self.kind.shared:
            examples = [example._replace(group=-1) for example in examples]
        chunks = in_chunks(examples, rows_per_micro_batch)
        return [self.collate([examples[i] for i in chunk]).to(self.device) for chunk in chunks]

    def losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        counts = Counts(*(sum(column) for column in zip(*map(count, batches), strict=True)))
        for batch in batches:
            yield total(self.model(batch).sums, counts, self.weights)

    def groups(self) -> list[dict[str, object]]:
        heads = [p for p in self.model.heads.parameters() if p.requires_grad]
        return [{"params": [self.model.tags.learned_TD], "lr": TAG_LR}, {"params": heads, "lr": HEAD_LR}]

    def num_tokens(self, row: Row) -> int:
        return len(row.example.ids)

    def ideal_speedup(self, steps: Sequence[Step], rows_per_micro_batch: int) -> float:
        """Decoder FLOPs of the plain full backward over those of this method on these steps."""
        work = work_of([batch for rows in steps for batch in self.batches(rows, rows_per_micro_batch)], 0)
        computed = 0.0 if self.kind.seen_before else work.distinct
        return 1 / work._replace(computed=computed).flops_ratio

    @torch.no_grad()
    def encode(self, batch: Batch) -> None:
        self.model.encode_prefix(batch)

    def encoding_flops(self, batch: Batch) -> tuple[float, int]:
        """What encoding the prefixes of a batch needs, 2 N per token and causal attention, and the tokens."""
        backbone = self.model.backbone
        config = backbone.config.get_text_config()
        table = backbone.get_input_embeddings().weight
        num_weights = sum(p.numel() for p in backbone.base_model.parameters() if p is not table)
        attended = sum(int((tokens.at_N + 1).sum()) for tokens in (batch.pieces.tokens, batch.own))
        width = config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
        num_tokens = len(batch.pieces.tokens.ids_N) + len(batch.own.ids_N)
        return 2.0 * num_weights * num_tokens + 4.0 * config.num_hidden_layers * width * attended, num_tokens


def ours() -> list[Ours]:
    return [
        Ours("f", "tagllm, prefix: full", Kind(frozen=False, shared=False)),
        Ours("g", "tagllm, frozen prefix", Kind(shared=False)),
        Ours("h", "+ shared", Kind()),
        Ours("i1", "+ remembered, first epoch", Kind(remembers=True)),
        Ours("i", "+ remembered, later epochs", Kind(remembers=True, seen_before=True)),
    ]
