"""Fault 1: SIGKILL of rank 0, rank 1 or both, anywhere; torchrun starts the ranks again each time."""

from __future__ import annotations

import random

from tests.faults.hooks import ZERO_ONLY, Order
from tests.faults.lab import Lab, keeps_going
from tests.faults.record import Record

FAULT = "1 SIGKILL of one rank or both"
KILLS_PER_RUN = 8
_NTH = {
    "load": 1, "rows": 8, "forward": 24, "backward": 24, "reduce": 30, "step": 8, "log": 10, "evaluate": 2, "save": 2,
    "write": 6, "rename": 2, "prune": 2,
}  # fmt: skip
"""How often a start comes to a point within some eight steps: two ranks, three micro-batches each."""


def orders(chooser: random.Random) -> list[Order]:
    """One kill for each start of a run but the last."""
    made = []
    for start in range(KILLS_PER_RUN):
        point = chooser.choice(list(_NTH))
        rank = 0 if point in ZERO_ONLY else chooser.randrange(2)
        victims = chooser.choice([(0,), (1,), (0, 1)])
        made.append(Order(start, point, chooser.randint(1, _NTH[point]), "SIGKILL", rank, victims))
    return made


def kills(lab: Lab, number: int, seed: int) -> Record:
    """Runs with kills until there were `number` of them."""
    chooser, record = random.Random(seed), Record(FAULT, 0, [])
    while record.injected < number:
        trial = lab.trial(f"kills-{seed}-{record.injected}", *orders(chooser))
        with lab.torchrun(trial) as launcher:
            ended = keeps_going(launcher, trial)
        if not ended:
            return record.plus(Record(FAULT, len(trial.history.faults), [], hangs=1))
        assert launcher.returncode == 0, trial.said()[-3000:]
        record = record.plus(lab.judged(FAULT, trial))
    return record
