"""Faults 4 and 13: a full disk, an I/O error, slow and stale storage, two writers on one folder."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.launch import finish, kill, wait_until
from tests.faults.hooks import Order
from tests.faults.lab import STEPS, Lab
from tests.faults.record import Record

FULL, SLOW, WRITERS = "4 disk full", "13 slow, stale and failing storage", "13 two writers on one folder"


def missing() -> str:
    """Why no small disk can be made here; empty if one can."""
    if os.geteuid() != 0:
        return "a tmpfs of its own needs root"
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return "" if done.returncode == 0 else "a tmpfs cannot be mounted here"


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_for_a_while(lab: Lab) -> Record:
    """From the second save to the third: training goes on, says what it needs, and ends like a run left alone."""
    trial = lab.trial("full", Order(0, "save", 2, "fill"), Order(0, "save", 3, "free"))
    with small_disk(trial.run.path):
        outcome = lab.once(trial)
        told = [] if outcome.status == [0, 0] else [f"left with {outcome.status}: {outcome.stderr}"]
        if "the checkpoint of step 10 was not written" not in outcome.stderr[0] or "It needs" not in outcome.stderr[0]:
            told.append(f"no warning with the bytes needed: {outcome.stderr[0]}")
        if [line["step"] for line in trial.run.metrics] != list(range(1, STEPS + 1)):
            told.append("the log has gaps")
        judged = lab.judged(FULL, trial)
    return judged._replace(corruptions=[*judged.corruptions, *told])


def full_at_the_end(lab: Lab) -> Record:
    """The result cannot be written: not a success, and the same command ends it once there is room."""
    trial = lab.trial("full-at-the-end", Order(0, "library", 1, "fill"))
    with small_disk(trial.run.path):
        first = lab.once(trial)
        told = [] if first.status == [2, 2] else [f"left with {first.status}"]
        if "cannot be written: [Errno 28] No space left on device" not in first.stderr[0]:
            told.append(f"said: {first.stderr[0]}")
        (trial.run.path / ".filler").unlink()
        again = lab.once(trial)
        told += [] if again.status == [0, 0] else [f"again: {again.status} {again.stderr}"]
        judged = lab.judged(FULL, trial)
    return judged._replace(corruptions=[*judged.corruptions, *told])


def slow_and_failing(lab: Lab) -> Record:
    """Writes that take two seconds, one EIO in a save, a kill, and a listing that hides the newest checkpoint."""
    trial = lab.trial(
        "slow", Order(0, "write", 1, "slow"), Order(0, "write", 5, "slow"), Order(0, "rename", 3, "eio"),
        Order(0, "rows", 22, "SIGKILL", 0, (0, 1)), Order(1, "load", 1, "stale"),
    )  # fmt: skip
    lab.once(trial)
    newest = trial.run.checkpoints[-1]
    before = (newest / "manifest.json").read_bytes()
    again = lab.once(trial)
    told = [] if again.status == [0, 0] else [f"left with {again.status}: {again.stderr}"]
    judged = lab.judged(SLOW, trial, every=3 * 5)  # one save failed, one was not seen
    known = f"but {int(newest.name.removeprefix('step-'))} was committed"
    told += [text for text in judged.corruptions if known not in text]
    if newest.exists() and (newest / "manifest.json").read_bytes() != before:
        told.append("the hidden checkpoint was written again with other content")
    return judged._replace(corruptions=told)


def two_writers(lab: Lab) -> Record:
    """The second is refused while the first lives, and takes over once it is dead."""
    trial, told = lab.trial("writers", Order(0, "rows", 8, "SIGSTOP", 0, (0,))), list[str]()
    first = lab.start(trial, 1)
    try:
        wait_until(lambda: any('"fault"' in line for line in _history(trial.lab)), first)
        second = lab.once(trial, 1)
        if second.status != [2] or "another process is writing here: pid" not in second.stderr[0]:
            told.append(f"the second writer: {second.status} {second.stderr}")
        first[0].send_signal(signal.SIGKILL)
        finish(first)
    finally:
        kill(first)
    third = lab.once(trial, 1)
    if third.status != [0]:
        told.append(f"the one that takes over: {third.status} {third.stderr}")
    judged = lab.judged(WRITERS, trial, tolerance=1e-6)
    return judged._replace(corruptions=[*judged.corruptions, *told])


def _history(lab: Path) -> list[str]:
    path = lab / "history-0.jsonl"
    return path.read_text().splitlines() if path.exists() else []
