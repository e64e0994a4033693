"""Trains and scores the runs of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tagllm.errors import UserError
from tagllm.side_by_side import Script, run_side_by_side
from tagllm.sweep.points import Point, Sweep


def run_sweep(sweep: Sweep, jobs: int) -> None:
    """Trains and scores what is not finished. A trial that fails is no candidate, as long as another one is.

    Raises:
        UserError: what failed, a line for each run; or nothing was begun, since some run contradicts itself.
    """
    sweep.require_stages()
    problems = run_all(sweep, sweep.trials(), jobs)
    for combination in sweep.combinations if problems else ():
        if not sweep.tried(combination):
            raise UserError(*problems)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    if failed := run_all(sweep, sweep.finals(), jobs):
        raise UserError(*failed)


def run_all(sweep: Sweep, points: Sequence[Point], jobs: int) -> list[str]:
    """Trains and scores what is not finished, `jobs` runs at a time; returned is a line for each run that failed."""
    return run_side_by_side([_work(sweep, point) for point in points if not sweep.done(point)], jobs)


def _work(sweep: Sweep, point: Point) -> Script:
    train = ["train", str(sweep.path), *sweep.overrides, *point.overrides()]
    return Script(str(point.folder), [train, ["eval", str(point.folder)]])
