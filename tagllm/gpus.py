"""How many GPUs this process may use, and that those of a job are not left idle unnoticed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tagllm.errors import UserError

DRIVER = Path("/dev/nvidiactl")
NONE = ("", "-1", "NoDevFiles")
"""What CUDA_VISIBLE_DEVICES is where a CPU is meant; the last is Slurm's word."""


def seen() -> int:
    """GPUs that torch sees.

    Raises:
        UserError: it sees none, but there are some, and nobody asked for the CPU.
    """
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if os.environ.get("DS_ACCELERATOR") != "cpu" and (why := _there()):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
        raise UserError(
            f"torch sees no GPU, but {why}: torch {torch.__version__} is built for {built}. Install one for a version "
            "of CUDA that the driver knows (nvidia-smi shows it), or set DS_ACCELERATOR=cpu to use the CPU."
        )
    return 0


def _there() -> str:
    """What says that there are GPUs; empty if nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "CROSS_RANK" not in os.environ:  # DeepSpeed's launcher names some on CPUs, too
        return "" if visible in NONE else f"CUDA_VISIBLE_DEVICES is {visible}"
    for name, value in sorted(os.environ.items()):
        if name == "SLURM_JOB_GPUS" or (name.startswith("SLURM_GPUS") and value != "0"):
            return f"{name} is {value}"
    return f"{DRIVER} is there" if DRIVER.exists() else ""


def main() -> None:
    """For launch/run.sh: GPUs, and cores that this process may use."""
    try:
        print(seen(), len(os.sched_getaffinity(0)))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
