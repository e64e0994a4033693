"""What a person can watch: metrics.jsonl, TensorBoard events and a progress bar. Rank 0 only."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tagllm.data.layout import TagLayout
from tagllm.files import write_whole


def row_norms(layout: TagLayout, learned: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean norm of the rows of each learned tag."""
    rows = layout.by_learned_tag(learned.get("tags.learned_TD"))
    return {f"tags/{name}/row_norm": float(rows_PD.norm(dim=1).mean()) for name, rows_PD in rows.items()}


class Monitor:
    """Logs scalars by step. On resume, lines after the step that is gone on from are dropped, and seconds go on from
    the last of the others.

    Args:
        silent: True on every rank but 0: nothing is written or shown.
    """

    def __init__(self, run: Path, total_steps: int, first_step: int, silent: bool) -> None:
        self.silent, self._started = silent, time.monotonic()
        self._bar: Progress | None = None
        if silent:
            return
        self._path = run / "metrics.jsonl"
        self._started -= _drop_after(self._path, first_step)
        self._lines = self._path.open("ab", buffering=0)
        self._events = Events(run / "tensorboard", first_step)
        self._unwritten = b""
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
        self._write(json.dumps(line).encode() + b"\n")
        self._events.add(step, known)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if "train/loss" in known:
                self._bar.update(self._task, note=f"loss {known['train/loss']:.4f}")

    def _write(self, line: bytes) -> None:
        """What the disk does not take is kept, and tried again with the next line."""
        error = append_whole(self._lines, self._unwritten + line)
        if error and not self._unwritten:
            self.say(f"warning: {self._path}: cannot be written: {error}. Training goes on; make room there.")
        self._unwritten = self._unwritten + line if error else b""

    def say(self, text: str) -> None:
        """A line for people, above the progress bar. Where it goes may be a full disk, or a pipe that is gone."""
        if not self.silent:
            with suppress(OSError, SystemExit):  # rich leaves the program when a pipe is gone
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
        for ending in (self._lines.close, self._events.close, sys.stderr.flush):
            with suppress(OSError):  # told already
                ending()


class Events:
    """A TensorBoard event file, one event per call. Its own writer would stop training for good on a full disk: the
    thread that writes dies, and whoever hands it events then waits for room in its queue.

    Events of steps after `first_step` that an earlier process wrote are dropped by TensorBoard.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb", buffering=0)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_step:
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=first_step + 1, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Any) -> None:
        record = io.BytesIO()
        self._writer(record).write(event.SerializeToString())
        append_whole(self._file, record.getvalue())


def append_whole(file: FileIO, data: bytes) -> OSError | None:
    """Whole or not at all, since what is cut off would hide all behind it; returns why not."""
    end = file.tell()
    try:
        if file.write(data) == len(data):
            return None
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as refused:
        error = refused
    with suppress(OSError):
        file.truncate(end)
        file.seek(end)
    return error


def _drop_after(path: Path, step: int) -> float:
    """Returns the seconds of the last line that is kept."""
    if not path.is_file():
        return 0.0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    write_whole(path, "".join(kept).encode())
    return float(json.loads(kept[-1])["seconds"]) if kept else 0.0


def _step_of(line: str) -> float:
    try:
        document: Any = json.loads(line)
        return int(document["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash
