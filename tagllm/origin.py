"""Where a result comes from: command, commit, versions, hardware and date stand beside every number that is kept."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ORIGIN = ("command", "commit", "hardware", "versions", "date")
_LIBRARIES = ("tagllm", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "rdkit")

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
"""Each several times as fast as the next."""


def origin() -> dict[str, Any]:
    """What `ORIGIN` names: the command as it was typed, and the date in UTC."""
    name, *words = sys.argv
    command = shlex.join(["tagllm" if name.endswith(("tagllm", "__main__.py")) else Path(name).name, *words])
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return {
        "command": command, "commit": commit(), "hardware": hardware(), "versions": versions(), "date": date,
    }  # fmt: skip


def commit() -> str:
    """Of the checkout that this package lies in, with a plus behind it where files differ; empty outside of one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def hardware() -> str:
    """The GPU, or else the CPU with the best instructions it has for bf16, its cores and the threads used of them."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    best = next((f" with {instructions}" for instructions in _INSTRUCTIONS if able.get(instructions)), "")
    return f"{name}{best}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@functools.cache
def code_digest() -> str:
    """Of this package's files as they stand, committed or not."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def peak_memory_gib() -> dict[str, float]:
    """Peak memory of this process: resident, and where there is a GPU what torch had allocated there."""
    import torch

    peaks = {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peaks["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks
