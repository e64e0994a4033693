"""Which rows make a step: all of them, in an order that only the seed and the step decide, on any number of ranks."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagllm.data.sampler import Draw, Groups, Sampler, all_draws, deal

quick = settings(max_examples=50, deadline=None)
sizes_st = st.lists(st.integers(1, 30), min_size=1, max_size=4)
shares_st = st.none() | st.lists(st.floats(0.01, 100), min_size=4, max_size=4)


def stream(sampler: Sampler, length: int) -> list[Draw]:
    """The first draws; `length` need not be whole steps."""
    steps = -(-length // sampler.rows_per_step)
    return [draw for step in range(steps) for draw in sampler.step(step)][:length]


@quick
@given(sizes_st, st.integers(1, 40), st.integers(0, 9))
def test_each_row_once_per_epoch(sizes: list[int], rows_per_step: int, seed: int) -> None:
    sampler = Sampler(sizes, None, rows_per_step, seed)
    every = [Draw(source, row) for source, size in enumerate(sizes) for row in range(size)]
    draws = stream(sampler, 3 * len(every))
    for epoch in range(3):
        assert sorted(draws[epoch * len(every) : (epoch + 1) * len(every)]) == every


@quick
@given(sizes_st, shares_st, st.integers(1, 40), st.integers(0, 9), st.lists(st.integers(0, 30), max_size=12))
def test_a_step_is_a_function_of_seed_and_step_alone(
    sizes: list[int], shares: list[float] | None, rows_per_step: int, seed: int, asked: list[int]
) -> None:
    """Whatever was asked for before, in whatever order: so a resumed run goes on as if never stopped."""
    shares = shares and shares[: len(sizes)]
    used = Sampler(sizes, shares, rows_per_step, seed)
    for step in asked:
        assert used.step(step) == Sampler(sizes, shares, rows_per_step, seed).step(step)


@quick
@given(sizes_st, shares_st, st.integers(0, 9))
def test_the_order_does_not_depend_on_the_rows_per_step(
    sizes: list[int], shares: list[float] | None, seed: int
) -> None:
    shares = shares and shares[: len(sizes)]
    whole, small = (stream(Sampler(sizes, shares, rows, seed), 2 * sum(sizes)) for rows in (sum(sizes), 3))
    assert whole == small


def test_draws_are_those_of_every_version() -> None:
    """A run that is gone on from after an update sees the rows that it would have seen."""
    groups = [None, Groups(np.arange(20) % 3, 2)]
    draws = stream(Sampler([30, 20], [1, 2.5], 7, 3, groups), 140)
    assert hashlib.sha256(repr([tuple(draw) for draw in draws]).encode()).hexdigest()[:16] == "5f03cdf51a656c40"


def test_a_million_rows_take_little_memory() -> None:
    """Two epochs, as at the end of one."""
    sampler = Sampler([1_000_000], None, 100, 0)
    tracemalloc.start()
    sampler.step(0), sampler.step(10_000)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 40e6


def test_epochs_and_seeds_differ() -> None:
    epochs = [Sampler([50], None, 50, 0).step(step) for step in range(4)]
    epochs += [Sampler([50], None, 50, seed).step(0) for seed in (1, 2)]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert epochs[0] != sorted(epochs[0])


def test_sources_are_shuffled_among_each_other() -> None:
    """Not one source after the other, and two sources of a size not in the same order."""
    draws = Sampler([64, 64], None, 128, 0).step(0)
    assert 40 < sum(a.source != b.source for a, b in pairwise(draws)) < 90
    orders = [[draw.row for draw in draws if draw.source == source] for source in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("sizes", "shares", "expected"),
    [
        ([90, 10], None, [90, 10]),
        ([90, 10], [1, 1], [50, 50]),
        ([90, 10], [1, 3], [25, 75]),
        ([5, 5, 1], [1, 1, 1], [4, 4, 3]),
        ([10, 10], [0.001, 1], [0, 20]),
    ],
)
def test_shares_hold_in_every_epoch(sizes: list[int], shares: list[float] | None, expected: list[int]) -> None:
    total = sum(sizes)
    draws = stream(Sampler(sizes, shares, 7, 0), 4 * total)
    for epoch in range(4):
        counts = Counter(draw.source for draw in draws[epoch * total : (epoch + 1) * total])
        assert [counts[source] for source in range(len(sizes))] == expected


@quick
@given(sizes_st, st.lists(st.floats(0.01, 100), min_size=4, max_size=4), st.integers(0, 9))
def test_any_shares_are_met_within_one_row_and_no_row_twice_before_all_once(
    sizes: list[int], shares: list[float], seed: int
) -> None:
    shares, total = shares[: len(sizes)], sum(sizes)
    draws = stream(Sampler(sizes, shares, 5, seed), 3 * total)
    counts = Counter(draw.source for draw in draws[:total])
    for source, size in enumerate(sizes):
        assert abs(counts[source] - shares[source] / sum(shares) * total) < 1
        rows = [draw.row for draw in draws if draw.source == source]
        assert all(0 <= row < size for row in rows)
        for start in range(0, len(rows), size):
            cycle = rows[start : start + size]
            assert len(set(cycle)) == len(cycle)


@st.composite
def hands_st(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    num_ranks = draw(st.integers(1, 5))
    rows = list(range(num_ranks * draw(st.integers(1, 8))))
    homes = draw(st.lists(st.integers(0, 2**40), min_size=len(rows), max_size=len(rows)))
    return rows, homes, num_ranks


@quick
@given(hands_st())
def test_deal(dealt: tuple[list[int], list[int], int]) -> None:
    """Equal hands; together the rows of the step, whatever the number of ranks; at home wherever home has room."""
    rows, homes, num_ranks = dealt
    hands = deal(rows, homes, num_ranks)
    room = len(rows) // num_ranks
    assert [len(hand) for hand in hands] == [room] * num_ranks
    assert sorted(row for hand in hands for row in hand) == rows
    wanted = Counter(home % num_ranks for home in homes)
    for rank, hand in enumerate(hands):
        at_home = [row for row in hand if homes[row] % num_ranks == rank]
        assert len(at_home) == min(room, wanted[rank])
    assert hands == deal(rows, homes, num_ranks)


def test_rows_with_even_homes_never_move() -> None:
    """A row comes to the same rank in every epoch, where its prefix is remembered."""
    sampler = Sampler([32], None, 32, 0)
    found = []
    for step in range(3):
        rows = [draw.row for draw in sampler.step(step)]
        found.append({row: rank for rank, hand in enumerate(deal(rows, rows, 4)) for row in hand})
    assert found[0] == found[1] == found[2]


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 9), st.integers(1, 12))
def test_groups_come_together(group_n: list[int], together: int, seed: int, rows_per_step: int) -> None:
    """Every epoch has each row once; rows of a group stand in stretches of `rows_per_group` and one shorter one, whose
    order changes from epoch to epoch; and the number of rows per step does not matter."""
    groups = Groups(np.array(group_n), together)
    draws = stream(Sampler([len(group_n)], None, rows_per_step, seed, [groups]), 2 * len(group_n))
    assert draws == stream(Sampler([len(group_n)], None, 1, seed, [groups]), 2 * len(group_n))
    for epoch in (draws[: len(group_n)], draws[len(group_n) :]):
        assert sorted(draw.row for draw in epoch) == list(range(len(group_n)))
        stretches = [len(list(run)) for _, run in groupby(epoch, key=lambda draw: group_n[draw.row])]
        fewest = sum(-(-size // together) for size in Counter(group_n).values())
        assert len(stretches) <= fewest
    if len(set(group_n)) > 5:
        assert [d.row for d in draws[: len(group_n)]] != [d.row for d in draws[len(group_n) :]]


def test_a_limit_draws_from_all_of_sorted_data() -> None:
    """The first rows of a file sorted by protein would be of one protein."""
    sources: list[Any] = [range(600), range(400)]
    draws = all_draws(sources, 100)
    assert draws == sorted(set(draws)) == all_draws(sources, 100)
    assert 40 < sum(draw.source == 0 for draw in draws) < 80
    assert max(draw.row for draw in draws if draw.source == 0) > 500
    assert len(all_draws(sources)) == len(all_draws(sources, 1000)) == len(all_draws(sources, 5000)) == 1000
