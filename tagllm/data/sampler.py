"""Which rows make a step: a function of (seed, step) alone, never of the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")


class Draw(NamedTuple):
    """One row: of which source, and its index there."""

    source: int
    row: int


def all_draws(sources: Sequence[Sized], limit: int | None = None) -> list[Draw]:
    """Every row, or `limit` of them drawn evenly: data is often sorted, so the first ones would be of a kind."""
    draws = [Draw(at, row) for at, examples in enumerate(sources) for row in range(len(examples))]
    if limit is None or limit >= len(draws):
        return draws
    chosen = np.random.default_rng(0).choice(len(draws), limit, replace=False)
    return [draws[i] for i in np.sort(chosen)]


class Groups(NamedTuple):
    """Which group each row of a source is in, (n,), and how many rows of one are drawn together."""

    group_n: np.ndarray
    rows_per_group: int

    def order(self, random: np.random.Generator) -> np.ndarray:
        """All rows once: each group shuffled and cut into so many rows, these stretches shuffled."""
        shuffled = random.permutation(len(self.group_n))
        by_group = shuffled[np.argsort(self.group_n[shuffled], kind="stable")]
        starts = np.flatnonzero(np.diff(self.group_n[by_group], prepend=-1))
        stretches = [
            group[at : at + self.rows_per_group]
            for group in np.split(by_group, starts[1:])
            for at in range(0, len(group), self.rows_per_group)
        ]
        return np.concatenate([stretches[i] for i in random.permutation(len(stretches))])


class Sampler:
    """Draws rows from several sources as one endless stream, epoch after epoch.

    An epoch has as many draws as there are rows. With one source (or proportional mixing) each row comes exactly once
    per epoch; with other shares each source runs through its own permutations at its own pace.

    Args:
        sizes: rows of each source.
        shares: how often each source is drawn, in any unit; None draws in proportion to the rows.
        groups: for each source, what to draw together.
    """

    def __init__(
        self, sizes: Sequence[int], shares: Sequence[float] | None, rows_per_step: int, seed: int,
        groups: Sequence[Groups | None] | None = None,
    ) -> None:  # fmt: skip
        self.groups = [None] * len(sizes) if groups is None else list(groups)
        self.sizes, self.rows_per_step, self.seed = list(sizes), rows_per_step, seed
        self.rows_per_epoch = sum(sizes)
        self.draws = list(sizes) if shares is None else _apportion(shares, self.rows_per_epoch)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """Sources and rows of the draws of each epoch: as tuples of Python a million rows would take 100 MB."""

    def step(self, step: int) -> list[Draw]:
        """The rows of one optimizer step."""
        first = step * self.rows_per_step
        return [self._at(position) for position in range(first, first + self.rows_per_step)]

    def _at(self, position: int) -> Draw:
        epoch, offset = divmod(position, self.rows_per_epoch)
        if epoch not in self._epochs:
            before = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            self._epochs = before | {epoch: self._order(epoch)}
        sources, rows = self._epochs[epoch]
        return Draw(int(sources[offset]), int(rows[offset]))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        sources = np.repeat(np.arange(len(self.sizes)), self.draws)
        np.random.default_rng([self.seed, 0, epoch]).shuffle(sources)
        rows = np.empty(len(sources), np.int64)
        for source, (size, draws) in enumerate(zip(self.sizes, self.draws, strict=True)):
            positions = np.arange(epoch * draws, (epoch + 1) * draws)
            rows[sources == source] = self._permuted(source, size, positions)
        return sources, rows

    def _permuted(self, source: int, size: int, positions: np.ndarray) -> np.ndarray:
        rows = np.empty(len(positions), np.int64)
        for cycle in np.unique(positions // size):
            here = positions // size == cycle
            random, groups = np.random.default_rng([self.seed, 1, source, int(cycle)]), self.groups[source]
            order = groups.order(random) if groups else random.permutation(size)
            rows[here] = order[positions[here] % size]
        return rows


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the ratio of `shares` that add up to `total` (largest remainders)."""
    exact = np.array(shares, float) / sum(shares) * total
    whole = np.floor(exact).astype(int)
    for at in np.argsort(whole - exact, kind="stable")[: total - whole.sum()]:
        whole[at] += 1
    return [int(draws) for draws in whole]


def deal(rows: Sequence[Item], homes: Sequence[int], num_ranks: int) -> list[list[Item]]:
    """Deals the rows of a step to ranks, equally many each, every row to its home rank where that has room.

    A row that comes to the same rank in every epoch finds its remembered prefix there.
    """
    room = len(rows) // num_ranks
    hands: list[list[Item]] = [[] for _ in range(num_ranks)]
    guests: list[Item] = []
    for row, home in zip(rows, homes, strict=True):
        hand = hands[home % num_ranks]
        (hand if len(hand) < room else guests).append(row)
    for hand in hands:
        while len(hand) < room:
            hand.append(guests.pop(0))
    return hands
