"""What the launcher (torchrun, deepspeed, srun) says of this process; known before torch is imported."""

from __future__ import annotations

import os

from tagllm.errors import UserError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_alone(command: str) -> None:
    """Raises UserError under a launcher of several processes: each would do the same work."""
    if (size := world_size()) > 1:
        raise UserError(f"{command}: WORLD_SIZE is {size}; it works in one process. Start it without a launcher.")
