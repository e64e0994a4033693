"""Faults 6 and 7: signals to one rank or both, at any moment. All leave alike, soon, and nothing partial is seen."""

from __future__ import annotations

from typing import NamedTuple

from tagllm.train.signals import EXIT_NOTHING_DONE, EXIT_STOPPED
from tests.distributed.launch import finish
from tests.faults.hooks import Order
from tests.faults.lab import Lab, Trial
from tests.faults.record import Record

STOPS, BUSY = "6 SIGTERM, SIGUSR1 while training", "7 a signal while busy otherwise"
SOON_S = 10


class Case(NamedTuple):
    name: str
    orders: list[Order]


def one(name: str, point: str, nth: int, do: str, rank: int, *victims: int) -> Case:
    return Case(name, [Order(0, point, nth, do, rank, victims)])


TRAINING = [
    one("rank-0", "rows", 8, "SIGTERM", 0, 0),
    one("rank-1", "forward", 25, "SIGUSR1", 1, 1),
    one("both", "backward", 20, "SIGTERM", 0, 0, 1),
    Case("twice", [Order(0, "rows", 7, "SIGUSR1", 1, (1,)), Order(0, "gradients", 7, "SIGTERM", 1, (1, 0))]),
    one("in-a-save", "write", 2, "SIGTERM", 0, 0),
    one("the-other-in-a-save", "rename", 1, "SIGUSR1", 0, 1),
    one("in-a-collective", "reduce", 21, "SIGTERM", 1, 0),
    one("behind-the-last-collective", "step", 9, "SIGTERM", 1, 1),
    one("evaluating", "evaluate", 1, "SIGTERM", 1, 1),
]
OTHERWISE = [
    one("tokenising", "tokenise", 1, "SIGTERM", 0, 0, 1),
    one("loading", "backbone", 1, "SIGUSR1", 1, 1),
    one("resuming", "load", 1, "SIGTERM", 0, 0),
    one("exporting", "library", 1, "SIGTERM", 0, 0, 1),
]


def interrupted(lab: Lab, case: Case) -> Record:
    """Stopped by the signal, then started again; the end must be that of a run left alone."""
    trial = lab.trial(case.name, *case.orders)
    cache = {} if case.name != "tokenising" else {"data__max_tokens": 250}  # not tokenised before
    first = lab.once(trial, **cache)
    record = stopped_well(case, trial, first.status)
    again = lab.once(trial, **cache)
    assert again.status == [0, 0], again.stderr
    if cache:  # another config, so other digests; it ends
        return record
    judged = lab.judged(record.fault, trial)
    return judged._replace(corruptions=[*record.corruptions, *judged.corruptions])


def stopped_well(case: Case, trial: Trial, status: list[int]) -> Record:
    training = case in TRAINING
    fault, *_ = trial.history.faults
    steps = [e for e in trial.history.of_rank_0("step") if e["time"] > fault["time"] and e["start"] == 0]
    told = []
    if training and status != [EXIT_STOPPED, EXIT_STOPPED]:
        told.append(f"{case.name}: left with {status}")
    if not training and not set(status) <= {0, 1, EXIT_STOPPED, EXIT_NOTHING_DONE}:
        told.append(f"{case.name}: left with {status}")
    if training and len(steps) > 2:
        told.append(f"{case.name}: {len(steps)} steps were done after the signal")
    partial = [path.name for path in trial.run.path.rglob("*.tmp*") if path.is_dir() and "library" in path.name]
    if partial:
        told.append(f"{case.name}: left {partial}")
    return Record(STOPS if training else BUSY, len(trial.history.faults), told)


def predicting(lab: Lab) -> Record:
    """SIGTERM in the middle of `tagllm predict`: no output, nothing beside it."""
    trial = lab.trial("predicting", Order(0, "predict", 1, "SIGTERM", 0, (0,)))
    output = trial.lab / "out" / "predicted.csv"
    library = lab.undisturbed().run.path / "library"
    ranks = lab.start_command(trial, ["predict", str(library), str(lab.rows), str(output)])
    status = finish(ranks, SOON_S + 30).status
    left = [path.name for path in output.parent.iterdir()] if output.parent.exists() else []
    told = [f"predict left {left} with {status}"] if left or status == [0] else []
    return Record(BUSY, len(trial.history.faults), told)
