"""The ranks of a run: who I am, and the few collectives the trainer needs. Alone it is a world of one.

torchrun and deepspeed both set RANK, LOCAL_RANK and WORLD_SIZE.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tagllm.errors import UserError

Result = TypeVar("Result")
START_TIMEOUT = timedelta(minutes=10)
CALL_S = 2.0


class SharedError(UserError):
    """A user error that every rank raises alike; only rank 0 prints it."""


class LostContact(Exception):
    """Another rank does not answer any more: it died, hangs, or the network between them is cut."""

    def __init__(self, told: str, stack: list[str]) -> None:
        self.stack = stack
        super().__init__(told)


@contextmanager
def in_contact(ranks: Ranks, where: Callable[[], str]) -> Iterator[None]:
    """Turns what the backends raise when a rank is gone into LostContact, with the ranks that do not answer and the
    lines of ours that waited for them; `where` says how far this rank came."""
    try:
        yield
    except RuntimeError as error:  # NCCL, gloo and the store raise several kinds of it
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        lost = isinstance(error, dist.DistError) or "gloo" in first.lower() or "closed by peer" in first
        if not lost:
            raise
        _, *frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if f"{os.sep}tagllm{os.sep}" in frame.filename]
        stack = [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in ours]
        phase = " > ".join(f.name for f in ours)
        silent = ranks.silent()
        who = f"no answer from rank {', '.join(map(str, silent))}" if silent else "all ranks wait, but not for the same"
        raise LostContact(f"{where()}: {who}, while in {phase}: {first}", stack) from error


def _met(rank: int, size: int) -> Any:
    """The launcher's store, once all ranks have come: they start minutes apart, whatever may pass between two steps.

    torchrun keeps one store over restarts, and what the dead have left there (addresses of gloo) makes the living wait
    for them. So each start greets with a word of its own, and rank 0 opens a round of those that have answered to it.
    """
    store, *_ = next(rendezvous("env://", rank, size, timeout=START_TIMEOUT))
    me, until = uuid.uuid4().hex, time.monotonic() + START_TIMEOUT.total_seconds()
    store.set(f"hello/{rank}", me)
    while time.monotonic() < until:
        if rank == 0 and store.check([f"hello/{other}" for other in range(size)]):
            store.set("round", ",".join(store.get(f"hello/{other}").decode() for other in range(size)))
        words = store.get("round").decode() if store.check(["round"]) else ""
        if words.split(",")[rank : rank + 1] == [me]:
            answer = hashlib.sha256(words.encode()).hexdigest()
            store.set(f"{answer}/{rank}", "")
            if rank == 0 and store.check([f"{answer}/{other}" for other in range(size)]):
                store.set(f"{answer}/open", "")
            if store.check([f"{answer}/open"]):
                return dist.PrefixStore(answer, store)  # type: ignore[attr-defined]  # undeclared
        time.sleep(0.02)
    raise LostContact(f"rank {rank}: not all of {size} ranks have come within {START_TIMEOUT}", [])


def ranks_per_node(size: int) -> int:
    """As torchrun, our Slurm script and the deepspeed launcher say; all ranks where nobody does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)


def limit_all_groups(timeout_s: int) -> None:
    """Groups that libraries have made (DeepSpeed makes some) wait half an hour, whatever ours does."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


class Ranks(NamedTuple):
    rank: int
    size: int
    device: torch.device
    store: Any = None
    """The launcher's, where ranks can leave word for each other without a collective; None alone."""

    @classmethod
    def start(cls, timeout_s: int) -> Ranks:
        """Joins the process group of the launcher, or makes a group of one."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            store = dist.HashStore() if size == 1 else _met(rank, size)  # type: ignore[attr-defined]  # undeclared
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        return cls(rank, size, device, dist.distributed_c10d._get_default_store() if size > 1 else None)

    def of_my_node(self) -> Any:
        """The process group of this rank's node. Collective.

        Raises:
            UserError: the nodes have different numbers of ranks, or the launcher does not number them node by node.
        """
        local = ranks_per_node(self.size)
        places = self.gather((local, int(os.environ["LOCAL_RANK"])))
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

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        # NCCL reduces on the device, gloo on the host
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return list(total.tolist())

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_rank_zero(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on rank 0 and gives its result to all; a UserError there is raised on all ranks."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome = [function(), None]
            except UserError as error:
                outcome = [None, error.problems]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise SharedError(*outcome[1])
        result: Result = outcome[0]
        return result

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
