"""What rank 0 does alone may take its time: a download, millions of rows to tokenise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import finish, start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def test_the_others_wait_for_what_rank_zero_does_alone(tmp_path: Path) -> None:
    """Longer than for a collective, after which a rank is taken for dead; then all know what came of it."""
    outcome = finish(start(["tests.distributed.slow_rank_zero"], 2, tmp_path))
    assert outcome.status == [0, 0], outcome.stderr
    assert [told.splitlines()[-2:] for told in outcome.stderr] == [["done", "row 7 is wrong"]] * 2
