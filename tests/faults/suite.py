"""All faults in one list: in full as a command, a seeded tenth of the long ones in every test run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import changes, interruptions, kills, silence, storage
from tests.faults.hostile import hostile
from tests.faults.lab import Lab
from tests.faults.record import Record
from tests.slurm import cluster, requeues

KILLS, REQUEUES, HOSTILE = 64, 20, 100_000
Work = Callable[[Lab], Record]


def suite(share: float, seed: int) -> Iterator[tuple[int, str, Work]]:
    """(number of the fault, what it is, the work): `share` of the many, all of the few."""

    def some(number: int) -> int:
        return max(round(number * share), 1)

    def sample(cases: list[interruptions.Case]) -> list[interruptions.Case]:
        return random.Random(seed).sample(cases, max(round(len(cases) * share), 2))

    yield 1, "kills", lambda lab: kills.kills(lab, some(KILLS), seed)
    if not storage.missing():
        yield 4, "full-for-a-while", storage.full_for_a_while
        yield 4, "full-at-the-end", storage.full_at_the_end
    for case in sample(interruptions.TRAINING):
        yield 6, case.name, lambda lab, case=case: interruptions.interrupted(lab, case)  # type: ignore[misc]
    for case in sample(interruptions.OTHERWISE):
        yield 7, case.name, lambda lab, case=case: interruptions.interrupted(lab, case)  # type: ignore[misc]
    yield 7, "predicting", interruptions.predicting
    if share == 1 and not cluster.missing():  # the tenth is tests/slurm
        yield 8, "requeues", lambda lab: slurm(lab, some(REQUEUES), seed)
    yield 9, "stopped-1", lambda lab: silence.stopped(lab, 1, "backward", 14)
    yield 9, "stopped-0", lambda lab: silence.stopped(lab, 0, "rows", 9)
    yield 9, "skipped", lambda lab: silence.skipped(lab, seed % 2, 15 + seed % 7)
    yield 10, "infinite-gradient", changes.infinite_gradient
    yield 10, "loaded-moment", changes.loaded_moment
    yield 11, "sizes", lambda lab: changes.sizes(lab)[0]
    for what in changes.CHANGES:
        yield 12, f"changed-{what}", lambda lab, what=what: changes.changed(lab.folder / f"of-{what}", what)  # type: ignore[misc]
    yield 13, "slow-and-failing", storage.slow_and_failing
    yield 13, "two-writers", storage.two_writers
    yield 14, "hostile", lambda lab: hostile(some(HOSTILE), seed)


def slurm(lab: Lab, times: int, seed: int) -> Record:
    folder = Path(lab.folder) / "slurm"
    folder.mkdir()
    with requeues.ready(folder) as ready:
        return requeues.requeued(ready, times, seed)
