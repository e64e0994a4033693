"""What a person can watch: metrics.jsonl, TensorBoard events and a progress bar. Rank 0 only."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def peak_memory_gib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Monitor:
    """Logs scalars by step. On resume, lines after the step that is gone on from are dropped.

    Args:
        silent: True on every rank but 0: nothing is written or shown.
    """

    def __init__(self, run: Path, total_steps: int, first_step: int, silent: bool) -> None:
        self.silent, self._started = silent, time.monotonic()
        self._bar: Progress | None = None
        if silent:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.jsonl"
        _drop_after(self._path, first_step)
        self._lines = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self.console = Console(stderr=True)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(run.name, total=total_steps, completed=first_step, note="")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Names use a slash for groups, as TensorBoard does: train/loss, valid/mse."""
        if self.silent:
            return
        known = {name: value for name, value in scalars.items() if math.isfinite(value)}  # JSON has no others
        line = {"step": step, "seconds": round(time.monotonic() - self._started, 3), **known}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in known.items():
            self._events.add_scalar(name, value, step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if "train/loss" in known:
                self._bar.update(self._task, note=f"loss {known['train/loss']:.4f}")

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if not self.silent:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.silent:
            return
        if self._bar is not None:
            self._bar.stop()
        self._lines.close()
        self._events.close()
        sys.stderr.flush()


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    path.write_text("".join(kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        document: Any = json.loads(line)
        return int(document["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash
