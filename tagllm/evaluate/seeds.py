"""Mean and 95 % interval over seeds, of runs and of trained baselines alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tagllm.evaluate.metric_kinds import kind_of

CONFIDENCE = 0.95
ROUNDING = 1e-4
"""Relative; what a fit on the same rows differs by in two runs."""


def over_seeds(metrics: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Mean of each that all have, and half of its 95 % interval (Student's t; None where seeds tell nothing: of one, or
    where all have the same but for rounding)."""
    first = metrics[0] if metrics else {}
    names = [name for name in first if all(isinstance(one.get(name), int | float) for one in metrics)]
    return {name: _interval([float(one[name]) for one in metrics]) for name in names}


def bounds(spread: Mapping[str, tuple[float, float | None]]) -> dict[str, tuple[float, float]]:
    """Both ends of each interval that there is, of what `over_seeds` returns, within what the metric can be."""
    found = {}
    for name, (mean, half) in spread.items():
        if half is not None:
            kind = kind_of(name)
            found[name] = max(mean - half, kind.least), min(mean + half, kind.most)
    return found


def _interval(values: Sequence[float]) -> tuple[float, float | None]:
    from scipy.stats import sem, t

    mean = float(np.mean(values))
    if np.allclose(values, mean, rtol=ROUNDING, atol=0):
        return mean, None
    return mean, float(sem(values) * t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
