"""Attention in parts: over frozen keys of earlier passes and over the keys of this pass, with one softmax over all.

Frozen keys and values are plain constants: never differentiated (concatenating made the backward spend most of a step
on gradients nobody needs), never repeated over heads, nor over the rows that share them unless they are few. Behind
those that each row has for itself there is room, into which the live ones are written: both are then one set. Outside
of this file rows stand behind each other without padding; attention is per row, so here they are padded.

B rows, N positions, S the longest row, H query heads, G key-value heads, T keys of a part, E head size, n pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache

from tagllm.data.batch import Tokens
from tagllm.model.architecture import changed_behind_the_cache, not_supported, require_known, require_supported
from tagllm.model.masks import seen
from tagllm.model.merged_attention import EXPLICIT_UP_TO, Shared, attend_merged
from tagllm.model.parts_function import Group, Groups, KeySet, Live, attend_parts
from tagllm.model.rotation import Rotation, turned_back
from tagllm.model.row_padding import RowPadding

NAME = "tagllm_parts"
PADDED_UP_TO = 4
"""Times the rows of a batch: products over padded groups of rows beat a product per group."""


class FrozenKeys(NamedTuple):
    """Frozen keys and values, of each layer (n, G, T, E), T the largest of `lengths`.

    `at_nT` are positions (-1 at pads), `span_nT` spans.

    `piece_B` says which piece a row has (-1: none; None: row b has piece b, and behind the T keys there is room for the
    live ones). With `offset_B`, pieces do not know where
    they stand: in row b from `offset_B[b]` on, as span `span_B[b]`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    at_nT: Tensor
    span_nT: Tensor
    lengths: tuple[int, ...]
    piece_B: tuple[int, ...] | None = None
    offset_B: Tensor | None = None
    span_B: Tensor | None = None

    def only(self, rows: Sequence[int]) -> FrozenKeys:
        """For these rows of the batch."""
        pieces = range(len(self.at_nT)) if self.piece_B is None else self.piece_B
        at = torch.tensor(rows, device=self.at_nT.device)
        offset_B, span_B = (None if t is None else t[at] for t in (self.offset_B, self.span_B))
        return self._replace(piece_B=tuple(pieces[b] for b in rows), offset_B=offset_B, span_B=span_B)

    def groups(self) -> Groups:
        each = [Group(i, _slice_if_adjacent(rows), self.lengths[i]) for i, rows in self._rows_of().items()]
        return Groups(each, self.together(PADDED_UP_TO) if self.at_nT.is_cuda and each else None)

    def together(self, limit: float) -> tuple[Tensor, Tensor] | None:
        """For `Groups`; None where padded groups have more than `limit` times the rows of the batch."""
        rows_of, piece_B = self._rows_of(), self.piece_B or ()
        num_pieces, most = len(self.at_nT), max(map(len, rows_of.values()), default=1)
        if num_pieces * most > limit * len(piece_B):
            return None
        padded = [rows + [0] * (most - len(rows)) for rows in (rows_of.get(i, []) for i in range(num_pieces))]
        places = {b: piece * most + at for piece, rows in rows_of.items() for at, b in enumerate(rows)}
        place_B = [places.get(b, -1) for b in range(len(piece_B))]
        device = self.at_nT.device
        return torch.tensor(padded, device=device), torch.tensor(place_B, device=device)

    def _rows_of(self) -> dict[int, list[int]]:
        rows_of: dict[int, list[int]] = {}
        for b, piece in enumerate(self.piece_B or ()):
            if piece >= 0:
                rows_of.setdefault(piece, []).append(b)
        return rows_of

    def geometry(self) -> tuple[Tensor, Tensor]:
        """Positions (-1: no key) and spans of the keys that each row has, both (B, T)."""
        if self.piece_B is None:
            return self.at_nT, self.span_nT
        piece_B = torch.tensor(self.piece_B, device=self.at_nT.device)
        at_BT, span_BT = self.at_nT[piece_B.clamp(min=0)], self.span_nT[piece_B.clamp(min=0)]
        there_BT = (at_BT >= 0) & (piece_B >= 0)[:, None]
        if self.offset_B is not None and self.span_B is not None:
            at_BT, span_BT = at_BT + self.offset_B[:, None], self.span_B[:, None].expand_as(at_BT)
        return at_BT.where(there_BT, -1), span_BT


def _slice_if_adjacent(rows: list[int]) -> slice | list[int]:
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows


class PassCache(DynamicCache):
    """One pass of the decoder over `tokens` on top of `parts`: all that attention must know, and where its keys stay.

    To transformers it is a cache: `update` hands the keys on together with this object. `keep` is the dtype in which
    keys and values are kept and attention is computed; None keeps nothing and computes as the inputs are.
    """

    def __init__(
        self, tokens: Tokens, parts: Sequence[FrozenKeys], keep: torch.dtype | None, attention: str,
        rotation: Rotation | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.parts, self.keep, self.attention = tokens, list(parts), keep, attention
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.groups = [part.groups() for part in self.parts]
        self.turns = [
            rotation.turn(part.offset_B) if rotation and part.offset_B is not None else None for part in self.parts
        ]
        self.rows = RowPadding(tokens)
        self._bias: dict[int | None, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.keep:
            key_states, value_states = key_states.to(self.keep), value_states.to(self.keep)
            self.keys.append(key_states)
            self.values.append(value_states)
        return Keyed(self, layer_idx, key_states, value_states), value_states

    def is_plain(self, window: int | None) -> bool:
        """Whether every row sees all of its own earlier positions and nothing else."""
        return not self.parts and not self.tokens.spans and (window is None or window >= self.rows.longest)

    def can_merge(self, window: int | None) -> bool:
        """Whether there is no graph and each position sees all keys of its parts and all earlier ones of its row."""
        if any(part.offset_B is not None for part in self.parts):  # these may stand behind some of the row's positions
            return False
        reach = self.rows.longest + sum(max(part.lengths, default=0) for part in self.parts)
        return bool(self.keep) and not self.tokens.spans and (window is None or window >= reach)

    def bias(self, window: int | None) -> Tensor:
        """(B, 1, 1, S, T): 0 where a query sees a key of the parts or of this pass, else very low; once for all
        layers."""
        if window not in self._bias:
            at_BS, span_BS = self.rows.padded(self.tokens.at_N), self.rows.padded(self.tokens.span_N)
            own = at_BS.masked_fill(~self.rows.there_BS, -1), span_BS
            at_BT, span_BT = (torch.cat(c, dim=1) for c in zip(*(p.geometry() for p in self.parts), own, strict=True))
            hidden_BST = ~seen(at_BS, span_BS, at_BT, span_BT, window)
            bias_BST = torch.zeros(hidden_BST.shape, device=at_BS.device)
            self._bias[window] = bias_BST.masked_fill_(hidden_BST, torch.finfo(torch.float32).min)[:, None, None]
        return self._bias[window]


class Keyed(NamedTuple):
    """The keys and values (1, G, N, E) of one layer of a pass, as its cache has them."""

    of: PassCache
    layer: int
    keys: Tensor
    values: Tensor

    def __getattr__(self, name: str) -> Any:
        """What attention would be asked of is a tensor elsewhere."""
        raise changed_behind_the_cache("layer")


def use_parts_attention(model: Any) -> None:
    """Switches a transformers model over.

    Raises:
        UserError: the architecture does not take its attention from transformers' interface, or has something beside.
    """
    require_supported(model)
    with suppress(ValueError):
        model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise not_supported(model, "does not let its attention be chosen")


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """For transformers' own `generate`, which pads its rows."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module, query: Tensor, key: Keyed, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function of transformers' interface; gives (1, N, H, E). No dropout: the backbone is frozen."""
    require_known(module, attention_mask, kwargs)
    if value is not key.values:
        raise changed_behind_the_cache(type(module).__name__)
    this, rows = key.of, key.of.rows
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    query_1HNE, key_1GNE = query.to(value.dtype), key.keys.to(value.dtype)
    if not rows.longest:
        return torch.zeros_like(query_1HNE).transpose(1, 2), None
    explicit = query.device.type == "cpu" and this.attention == "sdpa" and rows.longest <= EXPLICIT_UP_TO
    if this.is_plain(sliding_window) and softcap is None and not explicit:
        return _plain(this, query_1HNE, key_1GNE, value, scale), None
    query_BHSE = rows.split(query_1HNE)
    keys_BGSE, values_BGSE = rows.split(key_1GNE), rows.split(value)
    B, H, S, E = query_BHSE.shape
    G = keys_BGSE.shape[1]
    if query.device.type == "cpu" and softcap is None and this.can_merge(sliding_window):
        shared = _shared(this, key.layer, query_BHSE)
        return rows.join(attend_merged(query_BHSE, keys_BGSE, values_BGSE, shared, scale)).to(value.dtype), None
    query_BGME = query_BHSE.reshape(B, G, -1, E).float() * scale
    queries, sets = [query_BGME], []
    own = None
    for part, groups, turn in zip(this.parts, this.groups, this.turns, strict=True):
        if part.piece_B is None:
            own = part
            continue
        if turn is not None:
            queries.append(turned_back(query_BGME.view(B, H, S, E), turn).view(B, G, -1, E))
        asked_by = 0 if turn is None else len(queries) - 1
        sets.append(KeySet(part.keys[key.layer], part.values[key.layer], groups, asked_by))
    below = (None, None) if own is None else (own.keys[key.layer], own.values[key.layer])
    live = Live(keys_BGSE, values_BGSE, *below)
    out_BGME = attend_parts(queries, sets, live, this.bias(sliding_window), softcap)
    return rows.join(out_BGME.view(B, H, S, E)).to(value.dtype), None


def _shared(this: PassCache, layer: int, query_BHSE: Tensor) -> list[Shared]:
    """What the rows of a prefix pass see beside their own positions: pieces that are placed, without their padding."""
    found = []
    for part, groups in zip(this.parts, this.groups, strict=True):
        assert part.piece_B is not None, "only the live pass has parts of one piece per row"
        for piece, rows, length in groups.each:
            keys, values = part.keys[layer][piece, :, :length], part.values[layer][piece, :, :length]
            found.append(Shared(rows, query_BHSE[rows], keys, values))
    return found


def _plain(this: PassCache, query_1HNE: Tensor, key_1GNE: Tensor, value_1GNE: Tensor, scale: float) -> Tensor:
    """Causal attention within each row: the kernels that are fastest for it. Pads stand behind, where nobody looks."""
    if (
        this.attention == "flash_attention_2" and value_1GNE.dtype != torch.float32
    ):  # live passes are fp32: not for flash
        return _flash(this.tokens, query_1HNE, key_1GNE, value_1GNE, scale)
    query, key, value = (this.rows.split(states) for states in (query_1HNE, key_1GNE, value_1GNE))
    if query.is_cuda and query.shape[1] != key.shape[1] and not _flash_takes(query, key, value):
        key, value = spread_over_heads(key, query.shape[1]), spread_over_heads(value, query.shape[1])
    return this.rows.join(causal(query, key, value, scale))


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """torch's attention in which each position sees itself and those before: (B, H, S, E)."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _flash_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's own flash kernel for CUDA does; no other there knows groups of heads and keeps no scores."""
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])
    return torch.backends.cuda.can_use_flash_attention(asked)


def spread_over_heads(states_BGSE: Tensor, heads: int) -> Tensor:
    """(B, H, S, E), for the memory-efficient kernel: in fp32 groups of heads go to the one that keeps all scores for
    backward, B x H x S x S of them in each layer."""
    return states_BGSE.repeat_interleave(heads // states_BGSE.shape[1], dim=1)


def _flash(tokens: Tokens, query_1HNE: Tensor, key_1GNE: Tensor, value_1GNE: Tensor, scale: float) -> Tensor:
    """flash-attn takes rows behind each other as they are."""
    from flash_attn import flash_attn_varlen_func

    lengths = torch.tensor([0, *tokens.lengths], device=query_1HNE.device)
    starts = lengths.cumsum(0).to(torch.int32)
    states = (t[0].transpose(0, 1)[: sum(tokens.lengths)] for t in (query_1HNE, key_1GNE, value_1GNE))
    longest = max(tokens.lengths)
    out_NHE: Tensor = flash_attn_varlen_func(
        *states, starts, starts, longest, longest, softmax_scale=scale, causal=True
    )
    return functional.pad(out_NHE, (0, 0, 0, 0, 0, query_1HNE.shape[2] - len(out_NHE)))[None]


AttentionInterface.register(NAME, attend)
