"""Runs of a tiny backbone under a plan of faults: 40 steps, a checkpoint every 5, two ranks unless said otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from tests import tiny
from tests.distributed.launch import Outcome, Run, assert_same, finish, kill, molecules
from tests.distributed.launch import start as start_ranks
from tests.faults.history import History, problems
from tests.faults.hooks import Order
from tests.faults.record import Record

EVERY, STEPS = 5, 40
TIMEOUT_S = 120
SILENT_S = 40
"""Longer than a start takes, and less than a rank waits for another (engine.timeout_s)."""


class Trial(NamedTuple):
    """A run folder and beside it what its plan and its history say."""

    lab: Path
    run: Run

    @property
    def history(self) -> History:
        return History.read(self.lab)

    @property
    def num_starts(self) -> int:
        return max((start[rank][0]["start"] + 1 for start in self.history.starts for rank in start), default=0)

    def order(self, *orders: Order) -> None:
        (self.lab / "plan.json").write_text(json.dumps([order._asdict() for order in orders]))

    def said(self) -> str:
        return (self.lab / "log").read_text()


class Lab:
    """Rows, a backbone and a config; the undisturbed run that others are held against."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backbone, self.rows = folder / "backbone", folder / "rows.csv"
        tiny.save_backbone(self.backbone)
        self.rows.write_text("smiles,size\n" + "".join(f"{s},{n}\n" for s, n, _ in molecules(60)))
        self.config = folder / "run.yaml"
        template = "The molecule is <SMILES> {smiles}. Its size is <Size>"
        self.config.write_text(yaml.safe_dump({
            "output": "run", "backbone": {"model": str(self.backbone), "dtype": "fp32"},
            "tags": {"SMILES": {"length": 2}, "Size": {"kind": "function", "length": 3, "head": {"reads": "both"}}},
            "data": {"sources": [{"path": str(self.rows), "target": "size", "template": template}]},
            "loss": {"span": 0.5, "value": 1.0}, "remember_gib": 0,
            "optim": {"steps": STEPS, "rows_per_step": 12, "rows_per_micro_batch": 2, "tag_lr": 1e-3},
            "evaluation": {"every_steps": 10}, "checkpoint": {"every_steps": EVERY}, "engine": {"timeout_s": 60},
        }))  # fmt: skip

    def trial(self, name: str, *orders: Order) -> Trial:
        """An empty folder with a plan."""
        trial = Trial(self.folder / name, Run(self.folder / name / "run"))
        trial.lab.mkdir()
        trial.order(*orders)
        return trial

    def arguments(self, trial: Trial, **overrides: object) -> list[str]:
        changes = (f"{key.replace('__', '.')}={value}" for key, value in overrides.items())
        return ["train", str(self.config), f"output={trial.run.path}", *changes]

    def start(self, trial: Trial, num_ranks: int = 2, **overrides: object) -> list[subprocess.Popen[str]]:
        """Ranks as a launcher starts them, without one."""
        return self.start_command(trial, self.arguments(trial, **overrides), num_ranks)

    def start_command(self, trial: Trial, arguments: list[str], num_ranks: int = 1) -> list[subprocess.Popen[str]]:
        os.environ |= {"LAB": str(trial.lab), "START": str(trial.num_starts)}
        return start_ranks(["tests.faults.rank", *arguments], num_ranks, self.folder / "cache")

    def once(self, trial: Trial, num_ranks: int = 2, **overrides: object) -> Outcome:
        """One start, to its end."""
        return finish(self.start(trial, num_ranks, **overrides), TIMEOUT_S)

    @contextmanager
    def torchrun(self, trial: Trial, max_restarts: int = 100) -> Iterator[subprocess.Popen[str]]:
        """Two ranks that torchrun starts again whenever one dies; the log is theirs and its own."""
        environment = {
            **os.environ, "LAB": str(trial.lab), "START": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TAGLLM_CACHE": str(self.folder / "cache"),
        }  # fmt: skip
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={max_restarts}"]
        with (trial.lab / "log").open("a") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-m", *command, "-m", "tests.faults.rank", *self.arguments(trial)],
                env=environment, stdout=log, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
            try:
                yield launcher
            finally:
                kill([launcher])

    def undisturbed(self, num_ranks: int = 2) -> Trial:
        """The same run left alone; made once."""
        name = f"undisturbed-{num_ranks}"
        if (self.folder / name).exists():
            return Trial(self.folder / name, Run(self.folder / name / "run"))
        trial = self.trial(name)
        outcome = self.once(trial, num_ranks)
        assert outcome.status == [0] * num_ranks, outcome.stderr
        return trial

    def judged(self, fault: str, trial: Trial, every: int = EVERY, tolerance: float = 0, hangs: int = 0) -> Record:
        """What the history says, held against the undisturbed run; tags bit for bit unless there is a tolerance."""
        history, undisturbed = trial.history, self.undisturbed()
        found = problems(history, undisturbed.history, every, tolerance == 0)
        try:
            assert_same(trial.run.tags, undisturbed.run.tags, tolerance)
        except AssertionError as error:
            found.append(f"the final tags differ: {error}")
        executed = sum(1 for _ in history.of_rank_0("step"))
        return Record(
            fault, len(history.faults), found, hangs, history.lost_steps(), history.restart_seconds(), executed, STEPS
        )


def keeps_going(process: subprocess.Popen[str], trial: Trial) -> bool:
    """True at the end of the process; False once no rank has written to the history for `SILENT_S`, however long the
    whole takes: the starts alone of a run with many take minutes on a slow machine."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        if (now := sum(path.stat().st_size for path in trial.lab.glob("history-*.jsonl"))) != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > SILENT_S:
            return False
        time.sleep(0.02)
    return True


def ends_within(processes: Sequence[subprocess.Popen[str]], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.02)
    return all(process.poll() is not None for process in processes)
