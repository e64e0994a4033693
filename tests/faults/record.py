"""The report: what was injected and what came of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table


class Record(NamedTuple):
    """Of one kind of fault."""

    fault: str
    injected: int
    corruptions: list[str]
    """Broken promises that nobody was told of."""
    hangs: int = 0
    lost_steps: Sequence[int] = ()
    restart_s: Sequence[float] = ()
    executed: int = 0
    committed: int = 0

    def plus(self, other: Record) -> Record:
        assert self.fault == other.fault
        return Record(
            self.fault, self.injected + other.injected, [*self.corruptions, *other.corruptions],
            self.hangs + other.hangs, [*self.lost_steps, *other.lost_steps], [*self.restart_s, *other.restart_s],
            self.executed + other.executed, self.committed + other.committed,
        )  # fmt: skip

    def cells(self) -> list[str]:
        lost = f"{statistics.median(self.lost_steps):g} / {max(self.lost_steps)}" if self.lost_steps else "-"
        restart = f"{statistics.median(self.restart_s):.1f} / {max(self.restart_s):.1f}" if self.restart_s else "-"
        goodput = f"{self.committed / self.executed:.0%}" if self.executed else "-"
        return [self.fault, f"{self.injected:,}", str(len(self.corruptions)), str(self.hangs), lost, restart, goodput]


TITLES = ("fault", "injected", "silent corruptions", "hangs", "lost steps p50 / max", "restart s p50 / max", "goodput")


def table(records: Sequence[Record]) -> Table:
    made = Table(title="faults injected and survived")
    for title in TITLES:
        made.add_column(title, justify="left" if title == "fault" else "right")
    for record in records:
        made.add_row(*record.cells())
    return made
