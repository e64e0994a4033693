"""Rows answered in batches that the ranks share out among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import ceil
from typing import TypeVar

from tagllm.ranks import Ranks

Result = TypeVar("Result")


def dealt(
    lengths: Sequence[int], rows_per_batch: int, answer: Callable[[list[int]], Sequence[Result]], ranks: Ranks
) -> list[Result]:
    """What `answer` gives for each row, in their order, on every rank. Batches are of rows as long as each other.

    Args:
        lengths: of all rows, the same on every rank.
        answer: of the rows of these numbers. Every rank calls it equally often (the last batch is answered again),
            since those that share the backbone gather each module together.
    """
    if not lengths:
        return []
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = min(rows_per_batch, ceil(len(lengths) / ranks.size))
    batches = [by_length[at : at + size] for at in range(0, len(by_length), size)]
    turns = range(ranks.rank, len(batches) + ranks.rank, ranks.size)
    found = ranks.gather([answer(batches[min(at, len(batches) - 1)]) for at in turns])
    in_turn = (found[at % ranks.size][at // ranks.size] for at in range(len(batches)))
    of_row = dict(zip(by_length, itertools.chain.from_iterable(in_turn), strict=True))
    return [of_row[row] for row in range(len(lengths))]
