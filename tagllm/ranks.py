"""The ranks of a run: who I am, and the few collectives the trainer needs. Alone it is a world of one.

torchrun and deepspeed both set RANK, LOCAL_RANK and WORLD_SIZE.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from tagllm import gpus, launched
from tagllm.errors import SharedError, UserError
from tagllm.rendezvous import met

Result = TypeVar("Result")
CALL_S = 2.0
PATIENCE_S = 24 * 3600.0
"""With what rank 0 does alone: what takes longer hangs."""


def ranks_per_node(size: int) -> int:
    """As torchrun, our Slurm script and the deepspeed launcher say; all ranks where nobody does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)


class Ranks(NamedTuple):
    rank: int
    size: int
    device: torch.device
    store: Any = None
    """The launcher's, where ranks can leave word for each other without a collective; None alone."""
    local: int = 0
    """The number on its node."""
    tell_every_s: float = 60.0
    """While the others wait for what rank 0 does alone; less than their patience."""

    @classmethod
    def start(cls, timeout_s: int) -> Ranks:
        """Joins the process group of the launcher, or makes a group of one.

        Raises:
            UserError: there are GPUs that torch does not see.
        """
        rank, size = launched.rank(), launched.world_size()
        local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
        device = torch.device("cpu")
        if num_gpus := gpus.seen():
            at = local % num_gpus  # Slurm may show each of its tasks one GPU alone
            device = torch.device("cuda", at)
            torch.cuda.set_device(device)
            os.environ["LOCAL_RANK"] = str(at)  # where DeepSpeed reads its device
        if not dist.is_initialized():
            store = dist.HashStore() if size == 1 else met(rank, size)  # type: ignore[attr-defined]  # undeclared
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
        shared = dist.distributed_c10d._get_default_store() if size > 1 else None
        return cls(rank, size, device, shared, local, timeout_s / 4)

    def of_my_node(self) -> Any:
        """The process group of this rank's node. Collective.

        Raises:
            UserError: the nodes have different numbers of ranks, or the launcher does not number them node by node.
        """
        local = ranks_per_node(self.size)
        places = self.gather((local, self.local))
        if places != [(local, rank % local) for rank in range(self.size)] or self.size % local:
            raise SharedError(
                f"engine.shard_over is node, which needs equally many ranks on every node, numbered node by node; the "
                f"launcher started (ranks there, number there): {places}. Use the same number of ranks on each node."
            )
        groups = [dist.new_group(list(range(first, first + local))) for first in range(0, self.size, local)]
        return groups[self.rank // local]

    def silent(self) -> list[int]:
        """Ranks that do not call this within `CALL_S`; for a rank that waited too long. No collective."""
        missing = list(range(self.size))

        def call() -> None:
            self.store.set(f"calling/{self.rank}", "")
            until = time.monotonic() + CALL_S
            for other in range(self.size):
                with suppress(RuntimeError):
                    self.store.wait([f"calling/{other}"], timedelta(seconds=max(until - time.monotonic(), 0.05)))
                    missing.remove(other)

        if self.store is None:
            return []
        calling = Thread(target=call, daemon=True)  # the store may be what does not answer
        calling.start()
        calling.join(CALL_S + 1)
        return [rank for rank in missing if rank != self.rank]

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        """On rank 0: tells the others `_told_busy` again and again, and at the end that they need not wait any more."""
        if self.size == 1:
            yield
            return
        over, failed = Event(), list[Exception]()

        def keep_telling() -> None:
            until = time.monotonic() + PATIENCE_S
            try:
                while not over.wait(self.tell_every_s) and time.monotonic() < until:
                    self._told_busy(True)
            except Exception as error:  # noqa: BLE001  raised below, where it is waited for
                failed.append(error)

        telling = Thread(target=keep_telling, daemon=True)
        telling.start()
        try:
            yield
        finally:
            over.set()
            telling.join()
        if failed:
            raise failed[0]
        self._told_busy(False)

    def _told_busy(self, busy: bool) -> bool:
        """What rank 0 says, on all ranks. Collective."""
        told = torch.tensor([busy], dtype=torch.int32, device=self.device)
        dist.broadcast(told, src=0)
        return bool(told.item())

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        # NCCL reduces on the device, gloo on the host
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return list(total.tolist())

    def sum_each(self, values: Mapping[str, float]) -> dict[str, float]:
        """`sum` by name; every rank has the same names."""
        return dict(zip(values, self.sum(list(values.values())), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_rank_zero(self, function: Callable[[], Result], long: bool = False) -> Result:
        """Runs `function` on rank 0 and gives its result to all; a UserError there is raised on all ranks.

        Args:
            long: it may take longer than ranks wait for each other (a download, millions of rows): rank 0 says
                meanwhile that it is still there. All else that takes so long hangs.
        """
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            with self._still_there() if long else nullcontext():
                try:
                    outcome = [function(), None]
                except UserError as error:
                    outcome = [None, error.problems]
        elif long:
            while self._told_busy(False):
                pass
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise SharedError(*outcome[1])
        result: Result = outcome[0]
        return result
