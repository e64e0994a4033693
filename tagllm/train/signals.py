"""SIGTERM, SIGUSR1 and Ctrl-C ask for a stop: the step or the evaluation batch is finished, the state saved, and the
run leaves with `EXIT_STOPPED`. A second Ctrl-C ends it at once.

Before the first step there is nothing to save, and the run ends at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""EX_TEMPFAIL: not done, try again. The Slurm script turns it into a requeue."""
EXIT_NOTHING_DONE = 76
"""As that, but no step was done since the start. The Slurm script gives up after some of these in a row."""


class Stopped(Exception):
    """The process is to leave with `status`; all that was done is saved."""

    def __init__(self, told: str, status: int) -> None:
        self.status = status
        super().__init__(told)


class StopAsked(Exception):
    """A signal has reached one of the ranks; raised by all of them at the same point."""


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """`with StopRequest() as stop: ... if stop.requested`. Handlers are put back afterwards."""

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        """True while a stop is better answered between steps or batches."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self.training:
            told = "stopped before the first step; nothing new to save. Start the same command again."
            raise Stopped(told, EXIT_NOTHING_DONE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
