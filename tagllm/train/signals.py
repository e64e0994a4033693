"""SIGTERM and SIGUSR1 ask for a stop: the step is finished, the state saved, and the run leaves with `EXIT_STOPPED`.

Before the first step there is nothing to save, and the run ends at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""EX_TEMPFAIL: not done, try again. The Slurm script turns it into a requeue."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Training was asked to stop and has saved its state."""


class StopRequest:
    """`with StopRequest() as stop: ... if stop.requested`. Handlers are put back afterwards."""

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        """True while a stop is better answered after the step."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.training:
            raise Stopped("stopped before the first step; nothing new to save. Start the same command again.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
