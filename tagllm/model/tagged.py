"""The frozen backbone with tags and heads: one forward from a batch to summed losses, values and features.

B rows, N positions of all rows, M labelled positions, D hidden size, K head outputs, G means over fields that heads
read (of each layer, and there of each pool).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tagllm.data.batch import Batch, PiecePositions, Tokens
from tagllm.data.layout import TagLayout
from tagllm.errors import UserError
from tagllm.head import Head, fields_read
from tagllm.model.allocator import give_back_freed_memory
from tagllm.model.architecture import logit_factor
from tagllm.model.attention import FrozenKeys, PassCache, use_parts_attention
from tagllm.model.embedding import TagEmbedding
from tagllm.model.lm_head import FrozenHead
from tagllm.model.loss import Sums, value_losses
from tagllm.model.prefix import Piece, Prefix, PrefixMemory, cut_into_pieces, in_passes, part_of
from tagllm.model.rotation import Rotation
from tagllm.model.value_head import HeadModule
from tagllm.tags import Tag
from tagllm.template import OUTPUT, SPAN


class Output(NamedTuple):
    """`token_loss_M` per labelled position; `values_BK` in units of the data (regression) or logits; features for
    closed-form fits: the state at the head's position, the means over the fields side by side, and the last state of
    the prefix."""

    sums: Sums
    token_loss_M: Tensor
    values_BK: Tensor
    last_BD: Tensor
    mean_BD: Tensor
    prefix_last_BD: Tensor


class TaggedModel(nn.Module):
    """Backbone (frozen), tag rows and heads (learned).

    Args:
        backbone: a transformers causal LM, frozen and in eval mode.
        tags: every tag of the layout; learned ones become rows of one parameter.
        memory: where prefixes are remembered, be it none of them; None (a must under ZeRO-3): every rank computes
            them anew each time, all in one pass.
        reads_tokens: whether any token is supervised; decided by the config, so that all ranks call the LM head alike.
        attention: what computes it where a row sees nothing but itself (`sdpa`, `flash_attention_2`).
    """

    def __init__(
        self, backbone: Any, tags: dict[str, Tag], layout: TagLayout, memory: PrefixMemory | None = None,
        reads_tokens: bool = True, attention: str = "sdpa",
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.layout, self.memory = backbone, layout, memory
        self.reads_tokens, self.attention = reads_tokens, attention
        rows = {name: tags[name].rows_PD for name in layout.lengths}
        text = backbone.config.get_text_config()
        width = backbone.get_input_embeddings().embedding_dim
        empty = [torch.zeros(0, width)]
        self.tags = TagEmbedding(
            torch.cat([*empty, *(rows[name] for name in rows if name not in layout.learned)]),
            torch.cat([*empty, *(rows[name] for name in layout.learned)]),
            layout.vocabulary_size,
        )
        heads = {name: head for name in layout.heads if (head := tags[name].head) is not None}
        for name, head in heads.items():
            if head.spec.reads != "last":
                _require_readable(name, head, layout, text.num_hidden_layers)
            if head.spec.layers and width != text.hidden_size:
                raise UserError(
                    f"tags.{name}.head.layers is {head.spec.layers}; states inside {text.model_type} have "
                    f"{text.hidden_size} numbers, its embeddings {width}. Leave it out, to read the last state."
                )
        self.heads = nn.ModuleDict({n: HeadModule(h).requires_grad_(n in layout.learned) for n, h in heads.items()})
        self._num_computed = 0
        use_parts_attention(backbone)
        self._num_heads = int(text.num_attention_heads)
        self.rotation = Rotation.of(backbone)

    def forward(self, batch: Batch) -> Output:
        """Prefix without a graph, live part on top of it, then losses at the supervised positions only."""
        prefix = self.encode_prefix(batch)
        live_ND, read_ND, _ = self._decode(batch.live, prefix.parts)
        last_BD = live_ND[batch.read_at_B].float()
        pooled_BGD = prefix.pooled_BGD + _pooled(read_ND, batch.live, self.layout.num_pools)
        mean_BD = fields_read(pooled_BGD, batch.num_pooled_BP, self.layout.reads_lengths)
        token_loss_M = self._token_losses(live_ND, batch)
        value_sum, values_BK = self._values(last_BD, mean_BD, batch)
        sums = Sums(
            token_loss_M[batch.label_term_M == SPAN].sum(),
            token_loss_M[batch.label_term_M == OUTPUT].sum(),
            value_sum,
        )
        return Output(sums, token_loss_M, values_BK, last_BD, mean_BD, prefix.last_BD)

    def forget(self) -> None:
        """Gives back the memory of remembered prefixes; from now on none are."""
        self.memory = None
        give_back_freed_memory()

    @torch.no_grad()
    def encode_prefix(self, batch: Batch) -> Prefix:
        """The shared pieces, then what each row has of its own on top of them; from memory where it is there."""
        device = batch.live.ids_N.device
        pieces = self._pieces(batch.pieces.tokens, batch.pieces.keys, [])
        used = [placement for placement in batch.pieces.placements if max(placement.piece_B) >= 0]
        parts = [_placed(pieces, placement, device) for placement in used]
        own = self._pieces(batch.own, batch.own_keys, parts)
        if sum(batch.own.lengths):
            short = [batch.is_short(placement) for placement in used]
            before = [placement.piece_B for placement, yes in zip(used, short, strict=True) if yes]
            rows = [[*(pieces[at[b]] for at in before if at[b] >= 0), piece] for b, piece in enumerate(own)]
            parts = [part for part, yes in zip(parts, short, strict=True) if not yes]
            parts.append(part_of(rows, room=max(batch.live.lengths)))
        hidden_size = self.tags.learned_TD.shape[1]
        none = torch.zeros(1 + self.layout.num_means, hidden_size, device=device)
        columns = [[pieces[i].states_SD if i >= 0 else none for i in p.piece_B] for p in batch.pieces.placements]
        columns.append([piece.states_SD for piece in own] if own else [none] * len(batch.own.lengths))
        last = [columns[at][b][0] for b, at in enumerate(batch.prefix_end_B)]
        pooled = [torch.stack([states[1:] for states in row]).sum(dim=0) for row in zip(*columns, strict=True)]
        return Prefix(parts, torch.stack(last), torch.stack(pooled))

    def _pieces(self, tokens: Tokens, keys: Sequence[bytes], parts: list[FrozenKeys]) -> list[Piece]:
        """The pieces of `tokens` on top of `parts`: remembered ones, and the others computed."""
        if not len(tokens.ids_N):
            return []
        if self.memory is None:
            return self._compute(tokens, parts)
        device = tokens.ids_N.device
        found = [self.memory.recall(key, device) for key in keys]
        missing = [i for i, piece in enumerate(found) if piece is None]
        if not missing:
            return [piece for piece in found if piece is not None]
        before = sum(max(part.lengths, default=0) for part in parts)
        for some in in_passes(tokens, missing, self._num_heads, before):
            here, below = tokens, parts
            if len(some) < len(keys):
                here, below = tokens.only(some), [part.only(some) for part in parts]
            for i, piece in zip(some, self._compute(here, below), strict=True):
                self.memory.admit(keys[i], piece)
                found[i] = piece
        return [piece for piece in found if piece is not None]

    def head_scales(self) -> dict[str, Tensor]:
        """Centre and scale of what each head reads, by name, on the CPU."""
        buffers = {f"heads.{name}": buffer for name, buffer in self.heads.named_buffers()}
        return {name: buffer.cpu() for name, buffer in buffers.items() if name.endswith(("center_F", "scale_F"))}

    def set_head_scales(self, values: dict[str, Tensor]) -> None:
        """Takes back what `head_scales` gave."""
        for name, buffer in self.heads.named_buffers():
            if name.endswith(("center_F", "scale_F")):
                buffer.copy_(values[f"heads.{name}"])

    def take_computed(self) -> int:
        """Frozen positions computed since the last time this was asked."""
        taken, self._num_computed = self._num_computed, 0
        return taken

    def _compute(self, tokens: Tokens, parts: list[FrozenKeys]) -> list[Piece]:
        self._num_computed += sum(tokens.lengths)
        last_ND, read_ND, this = self._decode(tokens, parts, keep=self.backbone.dtype)
        return cut_into_pieces(tokens, this.keys, this.values, last_ND, read_ND, self.layout.num_pools)

    def _decode(
        self, tokens: Tokens, parts: list[FrozenKeys], keep: torch.dtype | None = None
    ) -> tuple[Tensor, list[Tensor], PassCache]:
        """Hidden states (N, D) of one pass of the backbone, those that means are taken of (of each layer), and its keys
        and values if kept. The residual stream is fp32."""
        this = PassCache(tokens, parts, keep, self.attention, self.rotation)
        out = self.backbone.base_model(
            inputs_embeds=self.tags(self.backbone.get_input_embeddings(), tokens.ids_N[None], torch.float32),
            position_ids=tokens.at_N[None],
            past_key_values=this,
            use_cache=True,
            output_hidden_states=list(self.layout.layers),
        )
        return out.last_hidden_state[0], [states[0] for states in states_of(out, self.layout.layers)], this

    def _token_losses(self, live_ND: Tensor, batch: Batch) -> Tensor:
        hidden_MD = live_ND[batch.label_at_M]
        if not self.reads_tokens:
            return hidden_MD.float().sum(dim=1) * 0.0
        head: FrozenHead = self.backbone.get_output_embeddings()
        config = self.backbone.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        if (factor := logit_factor(config)) != 1:
            hidden_MD = hidden_MD * factor
        nats_M: Tensor = head(hidden_MD, batch.label_M, cap or None)
        return nats_M

    def _values(self, last_BD: Tensor, mean_BD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every head sees every row, for the same modules on all ranks, but no target of another head; each row keeps
        its own head's answer."""
        value_sum = last_BD.sum() * 0.0
        values_BK = torch.full_like(batch.target_BK, torch.nan)
        for index, head in enumerate(self.heads.values()):
            assert isinstance(head, HeadModule)
            answer_BK = head(last_BD, mean_BD)
            mine_B = batch.head_B == index
            width = answer_BK.shape[1]
            spec = head.spec
            target_BK = batch.target_BK[:, : spec.num_targets].where(mine_B[:, None], torch.nan)
            losses_BK = value_losses(answer_BK, head.standardise(target_BK), len(spec.classes or []))
            value_sum = value_sum + losses_BK.sum()
            answer_BK = nn.functional.pad(head.unstandardise(answer_BK), (0, values_BK.shape[1] - width))
            values_BK = torch.where(mine_B[:, None], answer_BK.detach(), values_BK)
        return value_sum, values_BK


def states_of(out: Any, layers: Sequence[int]) -> list[Tensor]:
    """What transformers gives of these layers, counted from the embeddings (0); of none: of the last one."""
    return [out.hidden_states[layer] for layer in layers] if layers else [out.last_hidden_state]


def _require_readable(name: str, head: Head, layout: TagLayout, num_layers: int) -> None:
    """Raises UserError where the model cannot give what the head reads."""
    if len(head.pools) != layout.num_pools:
        raise UserError(
            f"tags.{name}.head: it reads {len(head.pools)} means over fields side by side (pool is {head.spec.pool}), "
            f"but the prompts here have {layout.num_pools}. Use a template with as many kinds of fields, and heads of "
            "one pool."
        )
    if max(head.spec.layers, default=0) > num_layers:
        raise UserError(
            f"tags.{name}.head.layers is {head.spec.layers}; the backbone has {num_layers} layers (and 0, the "
            "embeddings). Leave out those beyond."
        )


def _placed(pieces: Sequence[Piece], placement: PiecePositions, device: torch.device) -> FrozenKeys:
    """Pieces where the rows have them. Only spans have numbers, and only free spans are placed with an offset."""
    used = sorted({i for i in placement.piece_B if i >= 0})
    part = part_of([[pieces[i]] for i in used])._replace(
        piece_B=tuple(used.index(i) if i >= 0 else -1 for i in placement.piece_B)
    )
    if not any(placement.span_B):
        return part
    offset_B, span_B = (torch.tensor(column, device=device) for column in (placement.offset_B, placement.span_B))
    return part._replace(offset_B=offset_B, span_B=span_B)


def _pooled(read_ND: Sequence[Tensor], tokens: Tokens, num_pools: int) -> Tensor:
    """Sums over the positions of each row that go into each mean (B, G, D), fp32; a product, since adding by index is
    not deterministic on CUDA."""
    device = read_ND[0].device
    row_N = torch.arange(len(tokens.lengths), device=device).repeat_interleave(
        torch.tensor(tokens.lengths, device=device), output_size=sum(tokens.lengths)
    )
    row_N = nn.functional.pad(row_N, (0, len(read_ND[0]) - len(row_N)), value=-1)
    pool_N = torch.where((row_N >= 0) & (tokens.pool_N > 0), row_N * num_pools + tokens.pool_N - 1, -1)
    into_PN = torch.arange(len(tokens.lengths) * num_pools, device=device)[:, None] == pool_N
    pooled = [into_PN.float() @ states_ND.float() for states_ND in read_ND]
    return torch.cat([pooled_PD.view(-1, num_pools, pooled_PD.shape[1]) for pooled_PD in pooled], dim=1)
