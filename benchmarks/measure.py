"""How things are measured: alternating times, bytes kept for backward, peak memory, the rate of matrix products."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.contestant import Contestant, synchronise
from benchmarks.workloads import Step

LONG_SECONDS = 10.0
"""A step as long as that is not run again for tuning."""


class Spread(NamedTuple):
    """A figure over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1 if self.median < 100 else 0
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def tune(contestant: Contestant, rows: Step, sizes: Sequence[int]) -> dict[int, float]:
    """Rows per second of a whole step for each number of rows per micro-batch.

    Every size once, then the two best again; the better run counts. So the size that is chosen has also been warmed up.
    """
    contestant.run([rows[: sizes[0]]], sizes[0])  # whatever is made lazily
    seconds = {size: sum(contestant.run([rows], size)) for size in sizes}
    for size in sorted(sizes, key=lambda size: seconds[size])[:2]:
        if seconds[size] < LONG_SECONDS:
            seconds[size] = min(seconds[size], sum(contestant.run([rows], size)))
    return {size: len(rows) / taken for size, taken in seconds.items()}


def alternate(
    contestants: Sequence[Contestant], sizes: dict[str, int], steps: Sequence[Step], repeats: int,
    report: Callable[[str, int, float], None],
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds over all steps, per contestant and repeat. Each repeat starts with another contestant."""
    seconds: dict[str, list[float]] = {contestant.letter: [] for contestant in contestants}
    for repeat in range(repeats):
        shift = repeat % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            gc.collect()
            taken = sum(contestant.run(steps, sizes[contestant.letter]))
            seconds[contestant.letter].append(taken)
            report(contestant.letter, repeat, taken)
    return seconds


def kept_bytes(contestant: Contestant, rows: Step) -> int:
    """Bytes that one forward of these rows keeps until its backward; where it makes several passes the last counts."""
    totals: list[int] = []
    with held_bytes(contestant.module) as held, _before_backward(lambda loss: totals.append(held(loss))):
        contestant.run([rows], len(rows))
    return totals[-1]


@contextmanager
def held_bytes(module: nn.Module) -> Iterator[Callable[[Tensor], int]]:
    """Gives what counts, for a loss made inside, the bytes of distinct storages kept until its backward, without
    parameters: what autograd saves, and what autograd functions merely hold (the keys and values of a frozen prefix).
    """
    known = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    def add_up(loss: Tensor) -> int:
        _each_held(loss, keep)
        total = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        return total

    with torch.autograd.graph.saved_tensors_hooks(keep, _same):
        yield add_up


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _before_backward(look: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows each loss that `Tensor.backward` is called on."""
    original: Any = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        look(self)
        original(self, *args, **kwargs)

    with mock.patch.object(Tensor, "backward", backward):
        yield


def _each_held(loss: Tensor, see: Callable[[Tensor], Tensor]) -> None:
    """Tensors that hang on the nodes of autograd functions written in Python, however deep in tuples and lists."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
        for value in vars(node).values() if hasattr(node, "__dict__") else ():
            _each_tensor(value, see)


def _each_tensor(value: Any, see: Callable[[Tensor], Tensor]) -> None:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        see(value)
    elif isinstance(value, tuple | list):
        for item in value:
            _each_tensor(item, see)


def matmul_rate(dtype: torch.dtype, device: torch.device, hidden: int, intermediate: int) -> float:
    """FLOP/s of the fastest of three shapes: a large square, and the decoder's own two large maps on 2,048 tokens."""
    side = 2048 if device.type == "cpu" else 8192
    shapes = [(side, side, side), (2048, hidden, intermediate), (2048, intermediate, hidden)]
    return max(_rate(shape, dtype, device) for shape in shapes)


def _rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    m, k, n = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    best = min(seconds_of(lambda: nn.functional.linear(a, b), device) for _ in range(10))
    return 2 * m * k * n / best


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def forget_peak(device: torch.device) -> None:
    """Peak memory counts from here. Gives what is free back to the system first, where the system can be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # not Linux, or not allowed: then the peak includes loading
        return


def peak_bytes(device: torch.device) -> int:
    """Of the process (resident memory) or, on CUDA, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_tensor_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors made in `work` on the CPU that are alive at once. The process's peak would count what
    its allocator keeps and fragments too, which differs from run to run by more than a tensor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
