"""What a pass over rows found on each rank comes to all of them, a bounded number of bytes at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from tagllm.evaluate import passes
from tagllm.evaluate.passes import Part, gathered

ROWS, WIDTH = 2, 100


class Rank:
    """One of several threads; like `Ranks`, and notes how many bytes of columns come at once."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: Barrier) -> None:
        self.rank, self.size, self.most = rank, size, 0
        self._slots, self._barrier = slots, barrier

    def gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(10)
        found = list(self._slots)
        self._barrier.wait(10)
        parts = [part for one in found if isinstance(one, list) for part in one]
        self.most = max(self.most, sum(column.nbytes for _, columns in parts for column in columns))
        return found


def parts_of(rank: int, num: int) -> list[Part]:
    return [([rank, at], [np.full((ROWS, WIDTH), rank * 100 + at, np.float32)]) for at in range(num)]


@pytest.mark.parametrize("limit", [1, 4000, 1 << 28])
@pytest.mark.parametrize("nums", [(7, 7), (7, 2), (0, 5), (0, 0)], ids=str)
def test_ranks_may_have_different_numbers_of_parts(
    nums: tuple[int, int], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "GATHERED_AT_ONCE", limit)
    slots, barrier = [None, None], Barrier(2)
    ranks = [Rank(rank, 2, slots, barrier) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        mine = [parts_of(rank, num) for rank, num in enumerate(nums)]
        found = [*threads.map(gathered, mine, ranks)]
    wanted = sorted(chosen for one in mine for chosen, _ in one)
    for one in found:
        assert sorted(chosen for chosen, _ in one) == wanted
        assert all((columns[0] == chosen[0] * 100 + chosen[1]).all() for chosen, columns in one)
    of_one_turn = 2 * 4 * ROWS * WIDTH  # a part of each rank
    assert max(rank.most for rank in ranks) <= max(limit, of_one_turn)
