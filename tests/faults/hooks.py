"""What a rank under test does besides training: it writes a history, and suffers what the plan of its folder orders.

    LAB/plan.json           [Order, ...]
    LAB/history-0.jsonl     a line for each thing that happened to rank 0, over all its starts

Only `tests.faults.rank` installs this; the product knows nothing of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tagllm import build, files, predict
from tagllm.data import examples
from tagllm.data.collate import Collator
from tagllm.ranks import Ranks
from tagllm.tags import TagLibrary
from tagllm.train import checkpoint
from tagllm.train.engine import Engine
from tagllm.train.monitor import Monitor
from tagllm.train.rows import StepRows
from tagllm.train.step import Step, Stepper
from tagllm.train.validation import Validation

POINTS: dict[str, tuple[Any, str]] = {
    "tokenise": (examples, "_write"), "backbone": (build, "load_backbone"), "load": (checkpoint, "load_newest"),
    "rows": (StepRows, "micro_batches"), "collate": (Collator, "__call__"), "forward": (Engine, "__call__"),
    "backward": (Engine, "backward"), "reduce": (Ranks, "sum"), "gradients": (Engine, "gradients"),
    "step": (Engine, "step"), "log": (Monitor, "log"), "evaluate": (Validation, "_forward"),
    "save": (checkpoint, "save"), "write": (checkpoint, "write_durably"), "rename": (checkpoint, "replace_folder"),
    "prune": (checkpoint, "_prune"), "library": (TagLibrary, "save"), "predict": (predict.Predictor, "predict"),
}  # fmt: skip
"""Where something can be ordered."""
ZERO_ONLY = ("tokenise", "load", "log", "save", "write", "rename", "prune", "library")
"""Points that rank 0 alone comes to."""


class Order(NamedTuple):
    """At the `nth` time (from 1) that `rank` comes to `point` in start `start` (from 0), `do` it to `victims`."""

    start: int
    """Ranks that are started together have the same number."""
    point: str
    nth: int
    do: str
    """A signal's name, or nan, inf, raise, eio, slow, skip, stale, fill, free."""
    rank: int = 0
    victims: tuple[int, ...] = (0,)
    line: int = 0
    """For `raise` at `collate`: only where the row of this line is among the rows; `nth` is then of no account."""


class Hooks:
    def __init__(self, lab: Path, rank: int) -> None:
        self.lab, self.rank = lab, rank
        self._file = os.open(lab / f"history-{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.start = int(os.environ["START"]) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        orders = [Order(**order) for order in json.loads((lab / "plan.json").read_text())]
        self._orders = [order for order in orders if order.start == self.start and order.rank == rank]
        self._seen: Counter[str] = Counter()
        self._origins: list[str] = []
        self.note("start", pid=os.getpid())

    def note(self, event: str, **about: object) -> None:
        """One write, so that a kill leaves the line or none of it."""
        line = {"event": event, "start": self.start, "rank": self.rank, "time": time.time(), **about}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def install(self) -> None:
        for point, (owner, name) in POINTS.items():
            setattr(owner, name, self._watched(point, getattr(owner, name)))
        self._keep_history()

    def _watched(self, point: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self._seen[point] += 1
            for order in self._orders:
                if order.point == point and self._hits(order, args):
                    self.note("fault", point=point, do=order.do, victims=order.victims)
                    if order.do == "skip":  # of a sum over the ranks: this one keeps its own values
                        return list(args[1])
                    args = self._suffer(order, args)
            return call(*args, **options)

        return watched

    def _hits(self, order: Order, args: tuple[Any, ...]) -> bool:
        if order.line:
            return any(example.origin.endswith(f"line {order.line}") for example in args[1])
        return order.nth == self._seen[order.point]

    def _suffer(self, order: Order, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if order.do.startswith("SIG"):
            for victim in sorted(order.victims, key=lambda v: v == self.rank):  # itself last
                os.kill(self._pid_of(victim), getattr(signal, order.do))
        elif order.do == "raise":
            raise ValueError("ordered by the plan")
        elif order.do == "eio":
            raise OSError(errno.EIO, "Input/output error")
        elif order.do == "slow":
            time.sleep(2)
        elif order.do in ("nan", "inf"):  # a loss whose value or gradient is not finite
            engine, loss, *rest = args
            return (engine, loss * (math.nan if order.do == "nan" else math.inf), *rest)
        elif order.do == "stale":
            _hide_newest(checkpoint)
        elif order.do == "fill":
            _fill(self.lab / "run")
        elif order.do == "free":
            (self.lab / "run" / ".filler").unlink()
        return args

    def _pid_of(self, rank: int) -> int:
        lines = (self.lab / f"history-{rank}.jsonl").read_text().splitlines()
        return int([json.loads(line) for line in lines if '"event": "start"' in line][-1]["pid"])

    def _keep_history(self) -> None:
        take, save, load, rows = Stepper.take, checkpoint.save, checkpoint.load_newest, StepRows.micro_batches

        def noting_rows(of: StepRows, step: int) -> Any:
            chunks = rows(of, step)
            self._origins = [example.origin for chunk in chunks for example in chunk]
            return chunks

        def noting_step(stepper: Stepper, step: int) -> Step:
            done = take(stepper, step)
            self.note(
                "step", step=step + 1, rows=self._origins, finite=done.finite, loss=done.loss.hex(),
                gradient=done.gradient_norm.hex(), tags=digest(stepper.engine.learned()),
            )  # fmt: skip
            return done

        def noting_save(folder: Path, state: checkpoint.TrainState, keep: int) -> Path:
            self.note("save", step=state.step, state=state_digest(state))
            path = save(folder, state, keep)
            self.note("saved", step=state.step)
            return path

        def noting_load(folder: Path) -> Any:
            state, skipped = load(folder)
            found = {"step": 0, "state": ""} if state is None else {"step": state.step, "state": state_digest(state)}
            self.note("loaded", skipped=len(skipped), **found)
            return state, skipped

        StepRows.micro_batches, Stepper.take = noting_rows, noting_step  # type: ignore[method-assign]
        checkpoint.save, checkpoint.load_newest = noting_save, noting_load  # type: ignore[assignment]


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(files.tensor_bytes(dict(sorted(tensors.items())))).hexdigest()


def state_digest(state: checkpoint.TrainState) -> str:
    return hashlib.sha256(files.json_bytes([digest(state.tensors), state.progress])).hexdigest()


def _hide_newest(module: Any) -> None:
    """A listing that does not show the newest checkpoint yet, once."""
    steps = module._steps

    def stale(folder: Path) -> Any:
        module._steps = steps
        return steps(folder)[:-1]

    module._steps = stale


def _fill(folder: Path) -> None:
    """Writes until the disk is full."""
    with (folder / ".filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
