"""What a person watches while a run trains: the log, the events, and TensorBoard's page itself."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from io import FileIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tagllm.run_folder import training_seconds
from tagllm.train.monitor import Monitor, row_norms
from tests import tiny
from tests.distributed.launch import kill, wait_until
from tests.test_checkpoint import in_child

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def watched(run: Path, first: int, last: int, silent: bool = False) -> None:
    run.mkdir(exist_ok=True)
    with Monitor(run, 10, first, silent) as monitor:
        for step in range(first + 1, last + 1):
            monitor.log(
                step, {"train/loss": 1 / step, "tags/Size/gradient_norm": 2.0 * step, "valid/none": float("nan")}
            )


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_events_and_lines_say_the_same(tmp_path: Path) -> None:
    watched(tmp_path / "run", 0, 6)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps, losses = zip(*scalars(tmp_path / "run", "train/loss"), strict=True)
    assert [line["step"] for line in lines] == list(steps)
    assert [line["train/loss"] for line in lines] == pytest.approx(losses)
    assert not any("valid/none" in line for line in lines)


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    watched(tmp_path / "run", 0, 6)
    watched(tmp_path / "run", 4, 8)
    assert [step for step, _ in scalars(tmp_path / "run", "train/loss")] == list(range(1, 9))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 8


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    watched(tmp_path / "run", 0, 3, silent=True)
    assert not list((tmp_path / "run").iterdir())


def test_a_full_disk_is_told_once_and_loses_no_line(tmp_path: Path) -> None:
    """The limit of a file's size stands in for it: lifted again, all lines are there, in order."""

    def work() -> None:
        run, told = tmp_path / "run", []
        run.mkdir()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Monitor(run, 10, 0, False) as monitor:
            monitor.say = told.append  # type: ignore[method-assign]
            for step in range(1, 101):
                limit = 200 if 3 <= step <= 90 else hard
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                monitor.log(step, {"train/loss": float(step), **dict.fromkeys(map(str, range(20)), 1 / 3)})
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 101))
        assert set(range(91, 101)) <= {step for step, _ in scalars(run, "train/loss")}
        (warning,) = told
        assert "cannot be written" in warning and "Training goes on" in warning

    assert in_child(work) == 0


def test_row_norms_are_of_each_learned_tag() -> None:
    layout = tiny.layout(("Learned", "F"))
    rows = torch.cat([torch.full((3, 4), 1.0), torch.full((3, 4), 3.0)])
    assert row_norms(layout, {"tags.learned_TD": rows}) == {"tags/Learned/row_norm": 2.0, "tags/F/row_norm": 6.0}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser (Debian: chromium)")
def test_the_page_shows_what_was_logged(tmp_path: Path) -> None:
    """`tensorboard --logdir RUN` in a real browser without a screen."""
    watched(tmp_path / "run", 0, 6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "run"), "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    page = f"http://127.0.0.1:{port}/"
    try:
        wait_until(lambda: answers(page), [server])
        wait_until(lambda: "tags/Size/gradient_norm" in seen(f"{page}?tagFilter=gradient_norm#timeseries"), [server])
    finally:
        kill([server])


def seen(page: str) -> str:
    """What the page holds once its scripts have run."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    return subprocess.run([*command, page], capture_output=True, text=True, timeout=120, check=True).stdout


def answers(page: str) -> bool:
    with suppress(OSError):
        return bool(urllib.request.urlopen(page, timeout=5).status == 200)
    return False


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk under `2> train.log`, or an event file whose disk is read-only by now."""
    (tmp_path / "run").mkdir()
    full = TextIOWrapper(FileIO("/dev/full", "w"), write_through=True)
    with Monitor(tmp_path / "run", 10, 0, False) as monitor:
        monkeypatch.setattr(monitor.console, "file", full)
        monitor.say("warning: no room")
        monitor._events._file = FileIO("/dev/full", "w")
        monitor.log(1, {"train/loss": 1.0})
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["step"] == 1


def test_seconds_go_on_where_a_run_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long another process takes until its first line."""
    run, clock = tmp_path / "run", [0.0]
    run.mkdir()
    monkeypatch.setattr("tagllm.train.monitor.time.monotonic", lambda: clock[0])
    for first, times in ((0, (2.0, 4.0)), (2, (6.0, 8.0))):
        clock[0] = 0.0
        with Monitor(run, 4, first, False) as monitor:
            for at, now in enumerate(times, first + 1):
                clock[0] = now
                monitor.log(at, {})
    assert training_seconds(run) == 4 + 8
