"""Trains and scores the runs of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tagllm.errors import UserError
from tagllm.side_by_side import Script, run_side_by_side
from tagllm.sweep.points import Point, Sweep


def run_sweep(sweep: Sweep, jobs: int) -> None:
    """Trains and scores what is not finished. A trial is trained alone; one that fails is no candidate, as long as
    another one is.

    Raises:
        UserError: what failed, a line for each run; or nothing was begun, since some run contradicts itself.
    """
    sweep.require_stages()
    problems = train(sweep, sweep.trials(), jobs)
    for combination in sweep.combinations if problems else ():
        if not sweep.tried(combination):
            raise UserError(*problems)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    if failed := train_and_score(sweep, sweep.finals(), jobs):
        raise UserError(*failed)


def run_one(sweep: Sweep, at: int) -> None:
    """The run of a process of a Slurm array.

    Raises:
        UserError: some run contradicts itself, there is none of that number, it waits for trials, or it failed.
    """
    sweep.require_stages()
    point, work = sweep.run_number(at), train if at < len(sweep.trials()) else train_and_score
    if failed := work(sweep, [point], jobs=1):
        raise UserError(*failed)


def train(sweep: Sweep, points: Sequence[Point], jobs: int) -> list[str]:
    """What is not finished, `jobs` runs at a time; returned is a line for each run that failed."""
    scripts = [Script(str(point.folder), [_train(sweep, point)]) for point in points if not sweep.trained(point)]
    return run_side_by_side(scripts, jobs)


def train_and_score(sweep: Sweep, points: Sequence[Point], jobs: int) -> list[str]:
    """As `train`, on the rows to test, too."""
    scripts = []
    for point in points:
        if not sweep.done(point):
            first = [] if sweep.trained(point) else [_train(sweep, point)]
            scripts.append(Script(str(point.folder), [*first, ["eval", str(point.folder)]]))
    return run_side_by_side(scripts, jobs)


def _train(sweep: Sweep, point: Point) -> list[str]:
    return ["train", str(sweep.path), *sweep.overrides, *point.overrides()]
