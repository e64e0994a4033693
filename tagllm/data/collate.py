"""Examples -> a batch: cut at the first learned row, and what several rows share taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagllm.data.batch import Batch, PiecePositions, Pieces, Tokens
from tagllm.data.encode import Example
from tagllm.data.sharing import Share, beginnings, digest, free_spans
from tagllm.template import TAG

Positions = NDArray[np.int64]
FROZEN_FROM = 10
"""A prefix of less than one in so many positions of a batch is computed with the rest."""


class Collator(NamedTuple):
    """`terms`: the marks whose tokens are labels. `frozen_prefix` False puts every position into the live part.

    Without a gradient any cut is exact; `cut_at_function` gives probes the last state before the function tag.
    `block` numbers the spans and, where `free_spans`, makes each a piece that does not depend on where it stands.
    `sharded`: all ranks must run the same passes whatever their rows, so only groups are shared (`grouped`), not what
    happens to be alike in a batch. `num_pools` means over fields are counted. `behind_text`: a token that nothing but
    tags stands before is no label, since without its tags a prompt has nothing to predict it from.
    """

    first_learned_id: int
    terms: tuple[int, ...]
    num_outputs: int
    frozen_prefix: bool = True
    cut_at_function: bool = False
    block: bool = False
    free_spans: bool = False
    sharded: bool = False
    grouped: bool = False
    num_pools: int = 1
    behind_text: bool = False

    def live_at(self, example: Example) -> int:
        """The first position needed in the live part: the first learned row, the first labelled position, or where the
        head reads."""
        if self.cut_at_function:
            last = example.read_at if example.read_at >= 0 else len(example.ids) - 1
            return min(example.function_at, last)
        if not self.frozen_prefix:
            return 0
        learned = np.flatnonzero(example.ids >= self.first_learned_id)
        last = example.read_at if example.read_at >= 0 else len(example.ids) - 1
        return int(min([last, *learned[:1], *self._label_positions(example)[:1]]))

    def cuts(self, examples: Sequence[Example]) -> list[int]:
        """Where the live part of each row of a batch begins: as `live_at`, or at 0 where hardly anything stands before
        it. A few words before the tag of a long text are less work than the attention that takes them in costs, which
        is in parts and keeps every score. Not where a pass may not depend on the rows, or groups share prefixes."""
        found = [self.live_at(example) for example in examples]
        by_plan = self.cut_at_function or self.block or self.sharded or self.grouped
        total = sum(_end(example, self._label_positions(example)) for example in examples)
        return found if by_plan or sum(found) * FROZEN_FROM >= total else [0] * len(found)

    def probing(self) -> Collator:
        """For features without a gradient: cut right before the function tag, no labels."""
        return self._replace(terms=(), frozen_prefix=True, cut_at_function=True)

    def _label_positions(self, example: Example) -> Positions:
        """Positions whose next token is a label."""
        labelled = np.isin(example.marks[1:], self.terms)
        if self.behind_text:
            labelled &= (example.marks != TAG).cumsum()[:-1] > 0
        return np.flatnonzero(labelled)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Positions behind the last one needed are dropped."""
        cuts = self.cuts(examples)
        labels = [self._label_positions(example) for example in examples]
        ends = [_end(example, at) for example, at in zip(examples, labels, strict=True)]
        shares = self._shares(examples, cuts)
        own = [_outside(taken, cut) for taken, cut in zip(shares, cuts, strict=True)]
        live = [np.arange(cut, end) for cut, end in zip(cuts, ends, strict=True)]
        shifts = np.cumsum([0, *map(len, live)])[:-1] - np.array(cuts, np.int64)
        target_BK = np.full((len(examples), max(self.num_outputs, 1)), np.nan, np.float32)
        for i, example in enumerate(examples):
            target_BK[i, : len(example.target)] = example.target
        return Batch(
            self._pieces(examples, shares),
            self._tokens(examples, own, dummy=self.sharded and self.frozen_prefix),
            tuple(self._own_key(e, taken, cut) for e, taken, cut in zip(examples, shares, cuts, strict=True)),
            tuple(_prefix_end(taken, cut) for taken, cut in zip(shares, cuts, strict=True)),
            torch.stack([self._num_pooled(example, end) for example, end in zip(examples, ends, strict=True)]),
            self._tokens(examples, live),
            _labels(examples, labels, shifts),
            torch.tensor([max(e.read_at, cut) + shift for e, cut, shift in zip(examples, cuts, shifts, strict=True)]),
            torch.tensor([example.head for example in examples]),
            torch.from_numpy(target_BK),
        )

    def _shares(self, examples: Sequence[Example], cuts: Sequence[int]) -> list[list[Share]]:
        if self.block and self.free_spans:
            return free_spans(examples, cuts)
        return beginnings(examples, cuts, groups_only=self.sharded)

    def _pieces(self, examples: Sequence[Example], shares: Sequence[Sequence[Share]]) -> Pieces:
        """Distinct shares, and for each of a row which one it is."""
        free = self.block and self.free_spans
        known: dict[bytes, int] = {}
        kept: list[tuple[Example, Positions]] = []
        placements = []
        for column in zip(*shares, strict=True):
            piece_B = []
            for example, (start, end, _) in zip(examples, column, strict=True):
                inside = b"free" if free else self._spans(example)[start:end] if self.block else b""
                key = digest(inside, example.ids[start:end], example.pools[start:end])
                if end > start and key not in known:
                    known[key] = len(kept)
                    kept.append((example, np.arange(start, end)))
                piece_B.append(known[key] if end > start else -1)
            starts, _, spans = zip(*column, strict=True)
            placements.append(PiecePositions(tuple(piece_B), tuple(starts), tuple(spans)))
        dummy = self.sharded and self.frozen_prefix and (self.grouped or free)
        tokens = self._tokens([example for example, _ in kept], [positions for _, positions in kept], dummy)
        if free and kept:  # from position 0 on: a piece does not know where it will stand
            tokens.at_N.copy_(torch.cat([torch.arange(length) for length in tokens.lengths]))
            tokens.span_N.zero_()
            tokens = tokens._replace(spans=False)
        return Pieces(tokens, tuple(known), tuple(placements))

    def _num_pooled(self, example: Example, end: int) -> Tensor:
        counts = np.bincount(example.pools[:end], minlength=self.num_pools + 1)
        return torch.from_numpy(counts[1 : self.num_pools + 1])

    def _own_key(self, example: Example, taken: Sequence[Share], cut: int) -> bytes:
        """Of everything before the cut, and of which positions were taken out."""
        spans = example.spans_at.ravel() if self.block else b""
        return digest(b"own", np.array(taken, np.int64).ravel(), spans, example.ids[:cut], example.pools[:cut])

    def _tokens(self, examples: Sequence[Example], positions: Sequence[Positions], dummy: bool = False) -> Tokens:
        """The chosen positions of each example."""
        lengths = tuple(map(len, positions))
        columns = np.zeros((4, max(sum(lengths), int(dummy))), np.int64)
        start = 0
        for example, at in zip(examples, positions, strict=True):
            here = slice(start, start + len(at))
            columns[:, here] = example.ids[at], at, self._spans(example)[at], example.pools[at]
            start += len(at)
        return Tokens(torch.from_numpy(columns), lengths, bool(columns[2].any()))

    def _spans(self, example: Example) -> Positions:
        numbers = np.zeros(len(example.ids), np.int64)
        for number, (start, end) in enumerate(example.spans_at if self.block else [], 1):
            numbers[start:end] = number
        return numbers


def _end(example: Example, labels: Positions) -> int:
    """Behind the last position that anybody reads."""
    if not len(labels) and example.read_at < 0:
        return len(example.ids)
    return int(max([example.read_at, *labels[-1:]])) + 1


def _outside(taken: Sequence[Share], cut: int) -> Positions:
    """The positions before `cut` that lie in no share."""
    inside = np.zeros(cut, bool)
    for start, end, _ in taken:
        inside[start:end] = True
    return np.flatnonzero(~inside)


def _prefix_end(taken: Sequence[Share], cut: int) -> int:
    """Which share holds the last position of the prefix; their number if none."""
    return next((at for at, (start, end, _) in enumerate(taken) if start < end == cut), len(taken))


def _labels(examples: Sequence[Example], labels: Sequence[Positions], shifts: Positions) -> Tensor:
    """Where labels are predicted in the live part, the labels, and their terms (3, M); one pad if there is none."""
    pad = [[0, 0, -1]] * (not sum(map(len, labels)))
    columns = [
        np.stack([at + shift, example.ids[at + 1], example.marks[at + 1]], axis=1)
        for example, at, shift in zip(examples, labels, shifts, strict=True)
    ]
    return torch.from_numpy(np.concatenate([*columns, np.array(pad, np.int64).reshape(-1, 3)]).T.copy())


def no_batch(collate: Collator, examples: Sequence[Example], error: Exception) -> str:
    """What to tell of rows that cannot be made a batch: the one that fails by itself, if there is one."""
    culprit = "the rows of this step"
    for example in examples:
        try:
            collate([example])
        except Exception:  # noqa: BLE001  told by the caller
            culprit = example.origin
            break
    return f"{culprit}: cannot be made a batch: {type(error).__name__}: {error}"
