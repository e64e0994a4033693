"""Memory that is freed goes back where nothing needs it any more."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
from tagllm.model.allocator import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

keep_freed_memory()
before = resident()
pieces = [bytearray(b"1" * 200_000) for _ in range(1500)]
fences = pieces[9::10]
del pieces
kept = resident() - before
give_back_freed_memory()
print(kept, resident() - before, sum(map(len, fences)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_holes_between_what_is_held_are_given_back() -> None:
    told = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    kept, left, held = map(int, told.stdout.split())
    assert kept > 0.9 * 300e6, "freed buffers are kept until then"
    assert held <= left < 2 * held
