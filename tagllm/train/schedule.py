"""How long a run is and how the learning rates go."""

from __future__ import annotations

import math

from tagllm.config import OptimConfig


def total_steps(optim: OptimConfig, rows_per_epoch: int) -> int:
    """Optimizer steps of the run; a started epoch is finished, with the first rows of the next one to fill the step."""
    if optim.steps is not None:
        return optim.steps
    assert optim.epochs is not None
    return max(1, math.ceil(round(optim.epochs * rows_per_epoch / optim.rows_per_step, 6)))


def lr_factor(optim: OptimConfig, step: int, total: int) -> float:
    """Factor on every learning rate for the step with this index: linear warm-up, then the schedule down to 0."""
    if step < optim.warmup_steps:
        return (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / max(total - optim.warmup_steps, 1)
    if optim.schedule == "constant":
        return 1.0
    return 1.0 - done if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
