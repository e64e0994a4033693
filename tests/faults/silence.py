"""Fault 9: a rank that hangs, or skips a collective. The others say who, where and in which phase, within the limit."""

from __future__ import annotations

import signal

from tests.distributed.launch import finish, kill
from tests.faults.hooks import Order
from tests.faults.lab import Lab, ends_within
from tests.faults.record import Record

FAULT, LIMIT_S, ROOM_S = "9 a rank hangs or skips a collective", 5, 8


def stopped(lab: Lab, victim: int, point: str, nth: int) -> Record:
    """SIGSTOP of one rank; after the other has given up, both start again."""
    trial = lab.trial(f"stopped-{victim}-{point}", Order(0, point, nth, "SIGSTOP", victim, (victim,)))
    ranks = lab.start(trial, engine__timeout_s=LIMIT_S)
    other, told = ranks[1 - victim], list[str]()
    try:
        in_time = ends_within([other], 60)
        assert trial.history.faults
        said = other.communicate()[1] if in_time else ""
        told += _complaints(said, other.returncode, 1 - victim, victim)
        ranks[victim].send_signal(signal.SIGKILL)
        finish(ranks[victim : victim + 1])
    finally:
        kill(ranks)
    again = lab.once(trial)
    told += [] if again.status == [0, 0] else [f"again: {again.status} {again.stderr}"]
    judged = lab.judged(FAULT, trial, hangs=int(not in_time))
    return judged._replace(corruptions=[*judged.corruptions, *told])


def _complaints(said: str, status: int | None, rank: int, silent: int) -> list[str]:
    wanted = [
        f"error: rank {rank} in step",
        f"no answer from rank {silent}",
        "while in",
        "train/step.py:",
        "start the same",
    ]
    return [
        f"status {status}, {word!r} is not in {said[-2000:]!r}" for word in wanted if status != 1 or word not in said
    ]


def skipped(lab: Lab, rank: int, nth: int) -> Record:
    """Both must end by themselves, with nothing saved that is not of the undisturbed run."""
    trial = lab.trial(f"skipped-{rank}-{nth}", Order(0, "reduce", nth, "skip", rank, (rank,)))
    ranks = lab.start(trial, engine__timeout_s=LIMIT_S)
    in_time = ends_within(ranks, 60)
    outcome = finish(ranks)
    told = [f"left with {outcome.status}: {outcome.stderr}"] if 0 in outcome.status else []
    again = lab.once(trial)
    told += [] if again.status == [0, 0] else [f"again: {again.status} {again.stderr}"]
    judged = lab.judged(FAULT, trial, hangs=int(not in_time))
    return judged._replace(corruptions=[*judged.corruptions, *told])
