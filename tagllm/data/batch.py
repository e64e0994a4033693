"""What one micro-batch is to the model: stretches of prompts one behind the other, without padding.

B rows, N positions of all rows, M labelled positions, K head outputs, P pools of fields whose means heads read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tagllm.data.encode import Example
from tagllm.template import OUTPUT, SPAN


class Tokens(NamedTuple):
    """Stretches of prompts; `lengths` says where each ends. `spans`: whether any position lies in a numbered span.

    One position beyond the lengths is a dummy, so that a rank with nothing to compute still runs the backbone.
    """

    columns_4N: Tensor
    lengths: tuple[int, ...]
    spans: bool

    @property
    def ids_N(self) -> Tensor:
        return self.columns_4N[0]

    @property
    def at_N(self) -> Tensor:
        """Positions within the prompt."""
        return self.columns_4N[1]

    @property
    def span_N(self) -> Tensor:
        """Number of the span within the row, from 1 (0: outside of any, or no block mask)."""
        return self.columns_4N[2]

    @property
    def pool_N(self) -> Tensor:
        """Which of the means that heads read a position goes into, from 1 (0: none)."""
        return self.columns_4N[3]

    def to(self, device: torch.device) -> Tokens:
        return self._replace(columns_4N=self.columns_4N.to(device, non_blocking=True))

    def only(self, chosen: Sequence[int]) -> Tokens:
        """These stretches, in this order; a dummy if they have no position."""
        starts = np.cumsum([0, *self.lengths])
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
        at = torch.from_numpy(places if len(places) else np.zeros(1, int))
        lengths = tuple(self.lengths[i] for i in chosen)
        return Tokens(self.columns_4N[:, at.to(self.columns_4N.device, non_blocking=True)], lengths, self.spans)


class PiecePositions(NamedTuple):
    """Where shared pieces stand: in row b piece `piece_B[b]` (-1: none), from position `offset_B[b]` on, as span number
    `span_B[b]`."""

    piece_B: tuple[int, ...]
    offset_B: tuple[int, ...]
    span_B: tuple[int, ...]


class Pieces(NamedTuple):
    """Stretches that are computed once however many rows have them. `keys` digest all that their keys and values depend
    on. The second placement is for rows that have two of them (spans under the block mask), and so on."""

    tokens: Tokens
    keys: tuple[bytes, ...]
    placements: tuple[PiecePositions, ...]

    def to(self, device: torch.device) -> Pieces:
        return self._replace(tokens=self.tokens.to(device))


class Batch(NamedTuple):
    """A NamedTuple, since ZeRO-3's hooks walk tuples.

    The frozen prefix of a row is made of shared `pieces` and of its `own` positions; `prefix_end_B` says which
    placement holds the last one (their number: `own`). Heads read at `read_at_B`, counted over all of `live`.
    `target_BK` is padded with NaN to the widest head; `head_B` is -1 for rows without one.
    """

    pieces: Pieces
    own: Tokens
    own_keys: tuple[bytes, ...]
    prefix_end_B: tuple[int, ...]
    num_pooled_BP: Tensor
    live: Tokens
    labels_3M: Tensor
    read_at_B: Tensor
    head_B: Tensor
    target_BK: Tensor

    def to(self, device: torch.device) -> Batch:
        moved = (v.to(device) if isinstance(v, Tensor | Tokens | Pieces) else v for v in self)
        return Batch(*moved)  # type: ignore[arg-type]

    @property
    def label_at_M(self) -> Tensor:
        """Positions in `live` whose next token is a label."""
        return self.labels_3M[0]

    @property
    def label_M(self) -> Tensor:
        return self.labels_3M[1]

    @property
    def label_term_M(self) -> Tensor:
        """SPAN or OUTPUT; -1 pads, so that a rank without labels still calls the LM head."""
        return self.labels_3M[2]

    def is_short(self, placement: PiecePositions) -> bool:
        """Whether it is less to copy these pieces before each row's own positions than to attend to them apart."""
        lengths = self.pieces.tokens.lengths
        copied = sum(lengths[i] for i in placement.piece_B if i >= 0)
        return not any(placement.span_B) and copied <= sum(self.own.lengths)

    @property
    def prefix_lengths(self) -> list[int]:
        """Frozen positions of each row, those of shared pieces counted for every row that has them."""
        lengths = np.array(self.own.lengths)
        for placement in self.pieces.placements:
            lengths = lengths + [self.pieces.tokens.lengths[i] if i >= 0 else 0 for i in placement.piece_B]
        return [int(length) for length in lengths]


class Counts(NamedTuple):
    """How many terms of each loss a batch holds; sums over micro-batches and ranks are the denominators."""

    span: int
    output: int
    value: int


def count(batch: Batch) -> Counts:
    """Known before any forward, so the reduction over ranks comes first."""
    return Counts(
        int((batch.label_term_M == SPAN).sum()),
        int((batch.label_term_M == OUTPUT).sum()),
        int((~batch.target_BK.isnan()).sum()),
    )


def in_chunks(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Indices of examples, so many to a chunk: groups together, and chunks alike in length."""
    longest: dict[int, int] = {}
    for example in examples:
        longest[example.group] = max(longest.get(example.group, 0), len(example.ids))

    def key(at: int) -> tuple[int, int, int, bytes]:
        e = examples[at]
        return longest[e.group] if e.group >= 0 else len(e.ids), e.group, len(e.ids), e.ids.tobytes()

    order = sorted(range(len(examples)), key=key)
    return [order[at : at + size] for at in range(0, len(order), size)]
