"""Faults that a test orders for a run: hooks around the trainer, installed in a rank by `worker`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from tagllm.train.engine import Engine
from tagllm.train.step import Step, Stepper


class Poison(NamedTuple):
    """The gradient of one rank is NaN in these steps (counted from 0), though its losses are sound."""

    rank: int
    steps: list[int]


@contextmanager
def injected(poison: Poison | None) -> Iterator[None]:
    if poison is None:
        yield
        return
    now: dict[str, int] = {}
    take, backward = Stepper.take, Engine.backward

    def noting(self: Stepper, step: int) -> Step:
        now["step"] = step
        return take(self, step)

    def poisoned(self: Engine, loss: Tensor) -> None:
        hit = self.ranks.rank == poison.rank and now["step"] in poison.steps
        backward(self, loss * math.nan if hit else loss)

    with mock.patch.object(Stepper, "take", noting), mock.patch.object(Engine, "backward", poisoned):
        yield


def as_json(poison: Poison | None) -> Any:
    return None if poison is None else poison._asdict()


def of_json(value: Any) -> Poison | None:
    return None if value is None else Poison(**value)
