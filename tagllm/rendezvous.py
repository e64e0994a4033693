"""How ranks meet at the start, and what they say when one of them is gone."""

from __future__ import annotations

import hashlib
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tagllm.errors import LostContact

START_TIMEOUT = timedelta(minutes=10)


@contextmanager
def in_contact(silent: Callable[[], list[int]], where: Callable[[], str]) -> Iterator[None]:
    """Turns what the backends raise when a rank is gone into LostContact, with the `silent` ranks, which do not answer,
    and the lines of ours that waited for them; `where` says how far this rank came."""
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
        gone = silent()
        who = f"no answer from rank {', '.join(map(str, gone))}" if gone else "all ranks wait, but not for the same"
        raise LostContact(f"{where()}: {who}, while in {phase}: {first}", stack) from error


def met(rank: int, size: int) -> Any:
    """The launcher's store, once all ranks have come: they start minutes apart, whatever may pass between two steps.

    torchrun keeps one store over restarts, and what the dead have left there (addresses of gloo) makes the living wait
    for them. So each start greets with a word of its own, and rank 0 opens a round of those that have answered to it.

    Raises:
        LostContact: the store cannot be reached, or a rank does not come within `START_TIMEOUT`.
    """
    try:
        store, *_ = next(rendezvous("env://", rank, size, timeout=START_TIMEOUT))
        return _round(store, rank, size)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostContact(f"rank {rank}: the ranks cannot meet at {place}: {error}", []) from error


def _round(store: Any, rank: int, size: int) -> Any:
    me, until, pause_s, given = uuid.uuid4().hex, time.monotonic() + START_TIMEOUT.total_seconds(), 0.02, ""
    store.set(f"hello/{rank}", me)
    while time.monotonic() < until:
        if rank == 0 and store.check([f"hello/{other}" for other in range(size)]):
            store.set("round", ",".join(store.get(f"hello/{other}").decode() for other in range(size)))
        words = store.get("round").decode() if store.check(["round"]) else ""
        if words.split(",")[rank : rank + 1] == [me]:
            answer = hashlib.sha256(words.encode()).hexdigest()
            if answer != given:
                store.set(f"{answer}/{rank}", "")
                given = answer
            if rank == 0 and store.check([f"{answer}/{other}" for other in range(size)]):
                store.set(f"{answer}/open", "")
            if store.check([f"{answer}/open"]):
                return dist.PrefixStore(answer, store)  # type: ignore[attr-defined]  # undeclared
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.5)  # a thousand ranks ask the same store
    raise LostContact(f"rank {rank}: not all of {size} ranks have come within {START_TIMEOUT}", [])


def limit_all_groups(timeout_s: int) -> None:
    """Groups that libraries have made (DeepSpeed makes some) wait half an hour, whatever ours does."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
