"""What glibc does with freed buffers; where the C library is another one, nothing happens."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Large buffers go back to the system as soon as they are freed, and every step frees gigabytes of them: a fifth of
    the time on a CPU went into getting them again."""
    _set(1 << 30, (1 << 31) - 1)


def return_freed_memory() -> None:
    """While weights are read: else buffers of all sizes leave holes, and the peak is up to twice what is held."""
    _set(1 << 20, 1 << 20)


def give_back_freed_memory() -> None:
    """What is free now; buffers freed from now on are kept or returned as before."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_TRIM_THRESHOLD, trim_threshold)


def _of_glibc(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None) if platform.libc_ver()[0] == "glibc" else None
