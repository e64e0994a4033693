"""What every contestant is: something that makes full optimizer steps over given rows and says how long each took."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.models import Models
from benchmarks.workloads import Row, Step, Workload

TAG_LR, HEAD_LR, CLIP = 1e-2, 1e-3, 1.0
"""The same for all (a rate changes no speed); clipping is on, as it is by default in every library here."""


class Contestant(ABC):
    """One way to train. `module` is all that it holds: parameters and buffers do not count as saved for backward."""

    letter: str
    label: str
    module: nn.Module
    uses_tagged_backbone = False

    @abstractmethod
    def setup(self, workload: Workload, models: Models) -> None:
        """Makes everything that training needs. Called once."""

    @abstractmethod
    def run(self, steps: Sequence[Step], rows_per_micro_batch: int) -> list[float]:
        """Seconds of each optimizer step over these rows, in this order."""

    @abstractmethod
    def num_tokens(self, row: Row) -> int:
        """Real (unpadded) positions of the row as this method sees it, learned ones included."""


Batch = TypeVar("Batch")


class LoopContestant(Contestant, Generic[Batch]):
    """A plain loop: batches, then forward and backward of each, then clipping and AdamW. Making the batches counts."""

    device: torch.device
    _optimizer: torch.optim.AdamW | None = None

    @abstractmethod
    def batches(self, rows: Step, rows_per_micro_batch: int) -> list[Batch]:
        """The micro-batches of a step, on the device."""

    @abstractmethod
    def losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        """One loss per micro-batch, made when asked for; they add up to the loss of the step."""

    @abstractmethod
    def groups(self) -> list[dict[str, object]]:
        """Parameter groups of AdamW."""

    def run(self, steps: Sequence[Step], rows_per_micro_batch: int) -> list[float]:
        return [self._step(rows, rows_per_micro_batch) for rows in steps]

    def _step(self, rows: Step, rows_per_micro_batch: int) -> float:
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.groups(), weight_decay=0.0)
        synchronise(self.device)
        start = time.perf_counter()
        for loss in self.losses(self.batches(rows, rows_per_micro_batch)):
            loss.backward()
        learned = [p for group in self._optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(learned, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        synchronise(self.device)
        return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
