"""Several gloo ranks on this machine: `command` starts them as a launcher does, `Ranks` keeps them for many jobs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tagllm.train.signals import EXIT_STOPPED
from tests import tiny
from tests.distributed.faults import Poison, as_json

TIMEOUT_S = 60
_ATOMS = list("CCCCNOcF")


class Outcome(NamedTuple):
    """How each rank ended: exit status and stderr."""

    status: list[int]
    stderr: list[str]


class Run(NamedTuple):
    """What a run left in its folder."""

    path: Path

    @property
    def tags(self) -> dict[str, Tensor]:
        """The learned state of the last step. A head is one map: on states as they are its bias is what is left where
        their common offset cancels out, a small difference of large numbers."""
        tags = load_file(self.path / "last" / "tags.safetensors")
        for name in [name.removesuffix(".bias") for name in tags if name.endswith(".head.bias")]:
            tags[name] = torch.cat([tags.pop(f"{name}.weight"), tags.pop(f"{name}.bias")[:, None]], dim=1)
        return tags

    @property
    def state(self) -> dict[str, Tensor]:
        """The newest checkpoint: learned parameters and both moments of each."""
        return load_file(self.checkpoints[-1] / "state.safetensors")

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"))

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Lines of training steps."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "train/loss" in line]


def start(
    arguments: Sequence[str], num_ranks: int, cache: Path, captured: bool = True, folders: Sequence[Path] = ()
) -> list[subprocess.Popen[str]]:
    """One process per rank with the variables that torchrun sets, each the leader of its own process group, and in the
    folder of its own if they have some."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "TAGLLM_CACHE": str(cache), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL if captured else subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if captured else None, text=True, start_new_session=True,
            cwd=folders[rank] if folders else None,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip


def finish(ranks: Sequence[subprocess.Popen[str]], timeout_s: float = TIMEOUT_S) -> Outcome:
    """Waits for all ranks; a hang ends in their death and TimeoutExpired."""
    until = time.monotonic() + timeout_s
    try:
        errors = [rank.communicate(timeout=max(until - time.monotonic(), 0.1))[1] for rank in ranks]
    finally:
        kill(ranks)
    return Outcome([rank.returncode for rank in ranks], errors)


def kill(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """With their children: torchrun's ranks lead sessions of their own."""
    for rank in ranks:
        if rank.poll() is None:
            below = children_of(rank.pid)
            os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
            for process in below:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def children_of(process: int) -> list[int]:
    """All processes below this one."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    children = [int(child) for child in listed.read_text().split()] if listed.exists() else []
    return children + [below for child in children for below in children_of(child)]


def wait_until(done: Callable[[], bool], ranks: Sequence[subprocess.Popen[str]], timeout_s: float = TIMEOUT_S) -> None:
    """Polls; a dead rank or the timeout is an AssertionError."""
    until = time.monotonic() + timeout_s
    while not done():
        dead = [rank.args for rank in ranks if rank.poll() is not None]
        assert not dead and time.monotonic() < until, f"dead: {dead}" if dead else f"no end after {timeout_s} s"
        time.sleep(0.02)


def signal_after(
    run: Run, step: int, ranks: list[subprocess.Popen[str]], asked: signal.Signals = signal.SIGTERM
) -> None:
    """To the last rank as soon as `step` is logged."""
    log = run.path / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("train/loss") >= step, ranks)
    ranks[-1].send_signal(asked)


class Ranks:
    """Ranks that stay for many jobs. After a hang they are killed, and the next job starts new ones."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self._folder, self._jobs = size, folder, 0
        self._ranks: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kill(self._ranks)

    def run(
        self, arguments: Sequence[str], meanwhile: Callable[[list[subprocess.Popen[str]]], None] = lambda ranks: None,
        fault: Poison | None = None,
    ) -> Outcome:  # fmt: skip
        """Runs one `tagllm` command on all ranks; `meanwhile` may wait for something and signal them."""
        self._jobs += 1
        outcomes = [self._folder / f"outcome-{self.size}-{self._jobs}-{rank}.json" for rank in range(self.size)]
        if not self._ranks:
            self._ranks = start(["tests.distributed.worker"], self.size, self._folder / "cache", captured=False)
        try:
            for rank, outcome in zip(self._ranks, outcomes, strict=True):
                assert rank.stdin
                rank.stdin.write(json.dumps([list(arguments), str(outcome), as_json(fault)]) + "\n")
                rank.stdin.flush()
            meanwhile(self._ranks)
            wait_until(lambda: all(map(Path.exists, outcomes)) or any(map(_crashed, outcomes)), self._ranks)
            ended = [json.loads(outcome.read_text()) for outcome in outcomes if outcome.exists()]
            assert len(ended) == self.size, f"a rank crashed and left the others waiting: {ended}"
        except BaseException:
            kill(self._ranks)
            self._ranks = []
            raise
        return Outcome([status for status, _ in ended], [errors for _, errors in ended])


def _crashed(outcome: Path) -> bool:
    return outcome.exists() and json.loads(outcome.read_text())[0] == 1


class Workspace:
    """A tiny backbone, molecules of very different lengths, a config, and ranks to train on them."""

    def __init__(self, folder: Path, one: Ranks, two: Ranks) -> None:
        self.folder, self._ranks = folder, {1: one, 2: two}
        tiny.save_backbone(folder / "backbone")
        rows = molecules(48)
        (folder / "rows.csv").write_text("smiles,size,name\n" + "".join(f"{s},{n},{w}\n" for s, n, w in rows))
        # Ours keeps every tensor of a model this small resident; here all of it is to be sharded.
        self.sharding = folder / "zero3.json"
        self.sharding.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(self._config()))

    def _config(self) -> dict[str, Any]:
        return {
            "output": str(self.folder / "run"),
            "backbone": {"model": str(self.folder / "backbone"), "dtype": "fp32"},
            "tags": {
                "SMILES": {"kind": "domain", "length": 2},
                "Size": {"kind": "function", "length": 3, "head": {"reads": "both"}},
            },
            "data": {
                "sources": [
                    {
                        "path": str(self.folder / "rows.csv"), "target": "size",
                        "template": "The molecule is <SMILES> {smiles}. Its size is <Size>",
                    }
                ]
            },
            "loss": {"span": 0.5, "value": 1.0},
            "optim": {"steps": 6, "rows_per_step": 8, "rows_per_micro_batch": 2, "warmup_steps": 1},
            "evaluation": {"every_steps": 3},
            "remember_gib": 0,
        }  # fmt: skip

    def arguments(self, name: str, **overrides: object) -> list[str]:
        """`optim__steps=3` becomes optim.steps=3."""
        keys = {"output": self.folder / name, **overrides}
        return ["train", str(self.config), *(f"{k.replace('__', '.')}={v}" for k, v in keys.items())]

    def attempt(self, num_ranks: int, name: str, fault: Poison | None = None, **overrides: object) -> Outcome:
        return self._ranks[num_ranks].run(self.arguments(name, **overrides), fault=fault)

    def train(self, num_ranks: int, name: str, **overrides: object) -> Run:
        """A run that must end well."""
        outcome = self.attempt(num_ranks, name, **overrides)
        assert outcome.status == [0] * num_ranks, "\n".join(outcome.stderr)
        return Run(self.folder / name)

    def score(self, num_ranks: int, run: Run, *options: str) -> dict[str, Any]:
        """What `eval` finds, which must end well."""
        outcome = self._ranks[num_ranks].run(["eval", str(run.path), *options])
        assert outcome.status == [0] * num_ranks, "\n".join(outcome.stderr)
        found: dict[str, Any] = json.loads((run.path / "results.json").read_text())
        return found

    def predict(self, num_ranks: int, run: Run, *options: str) -> list[dict[str, str]]:
        """Rows of the table that `predict` writes, which must end well."""
        file = run.path / f"predicted-{num_ranks}.csv"
        outcome = self._ranks[num_ranks].run(
            ["predict", str(run.path), str(self.folder / "rows.csv"), str(file), *options]
        )
        assert outcome.status == [0] * num_ranks, "\n".join(outcome.stderr)
        with file.open() as table:
            return list(csv.DictReader(table))

    def attempt_to_compose(
        self, num_ranks: int, name: str, libraries: Sequence[Path], cases: dict[str, Any], **settings: Any
    ) -> Outcome:
        """`settings`: sections of the config in the place of those here."""
        values = {
            "output": str(self.folder / name), "backbone": self._config()["backbone"],
            "libraries": [str(path) for path in libraries], "cases": cases,
            "evaluation": {"generated_rows": 5, "max_new_tokens": 20, "beams": 2}, **settings,
        }  # fmt: skip
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values, sort_keys=False))
        return self._ranks[num_ranks].run(["compose", str(config)])

    def compose(
        self, num_ranks: int, name: str, libraries: Sequence[Path], cases: dict[str, Any], **settings: Any
    ) -> list[dict[str, Any]]:
        """What `compose` finds of each case, which must end well."""
        outcome = self.attempt_to_compose(num_ranks, name, libraries, cases, **settings)
        assert outcome.status == [0] * num_ranks, "\n".join(outcome.stderr)
        return [json.loads((self.folder / name / case / "results.json").read_text()) for case in cases]

    def stop(self, num_ranks: int, name: str, **overrides: object) -> Run:
        """A run whose last rank alone is sent SIGTERM once step 3 is logged: all ranks must save and leave with 75."""
        run = Run(self.folder / name)

        def signal_one(ranks: list[subprocess.Popen[str]]) -> None:
            signal_after(run, 3, ranks)

        outcome = self._ranks[num_ranks].run(self.arguments(name, **overrides), signal_one)
        assert outcome.status == [EXIT_STOPPED] * num_ranks, "\n".join(outcome.stderr)
        return run

    def copy(self, run: Run, name: str) -> Run:
        """The same run in another folder; its lock is of the process, so it stays behind."""
        shutil.copytree(run.path, self.folder / name, ignore=shutil.ignore_patterns(".lock"))
        return Run(self.folder / name)


def molecules(num_rows: int) -> list[tuple[str, float, str]]:
    """(letters like a molecule's, a number that follows from them, a short word)."""
    random = np.random.default_rng(7)
    strings = ["".join(random.choice(_ATOMS, random.integers(1, 25))) for _ in range(num_rows * 2)]
    unique = list(dict.fromkeys(strings))[:num_rows]
    return [(s, len(s) / 4 - s.count("N"), "long" * (1 + len(s) // 8)) for s in unique]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Every tensor by itself, so that a small one is not hidden by a large one. `relative` 0 is bit for bit."""
    assert found.keys() == expected.keys()
    errors = {
        name: tiny.relative_error(found[name], value)
        for name, value in expected.items()
        if not found[name].equal(value)
    }
    assert not {name: error for name, error in errors.items() if not error <= relative}, errors
