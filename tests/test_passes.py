"""Which rows a pass looks at."""

from __future__ import annotations

from typing import Any

from tagllm.data.sampler import all_draws


def test_a_limit_draws_from_all_of_sorted_data() -> None:
    """The first rows of a file sorted by protein would be of one protein."""
    sources: list[Any] = [range(600), range(400)]
    draws = all_draws(sources, 100)
    assert draws == sorted(set(draws)) == all_draws(sources, 100)
    assert 40 < sum(draw.source == 0 for draw in draws) < 80
    assert max(draw.row for draw in draws if draw.source == 0) > 500
    assert len(all_draws(sources)) == len(all_draws(sources, 1000)) == len(all_draws(sources, 5000)) == 1000
