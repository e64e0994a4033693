"""Metrics of held-out predictions, from torchmetrics."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
RESAMPLES = 500


def value_metrics(values_nK: Floats, targets_nK: Floats, classes: bool) -> dict[str, float]:
    """Regression: MSE, MAE, R2, Pearson, Spearman, concordance index, averaged over outputs. Classes: accuracy, macro
    F1, AUROC (macro, one against the rest), cross entropy.

    Rows whose target is missing (NaN) do not count; nothing is returned where no row has one.
    """
    if classes:
        return _class_metrics(values_nK, targets_nK[:, 0])
    per_output = []
    for k in range(targets_nK.shape[1]):
        known = np.isfinite(targets_nK[:, k])
        if known.sum() >= 2:
            per_output.append(_regression(values_nK[known, k], targets_nK[known, k]))
    return {name: float(np.mean([one[name] for one in per_output])) for name in (per_output[0] if per_output else {})}


def intervals(values_nK: Floats, targets_nK: Floats, classes: bool) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of `value_metrics` over the rows (percentiles of `RESAMPLES` draws): how much another
    draw of held-out rows would change them."""
    random = np.random.default_rng(0)
    known = np.flatnonzero(np.isfinite(targets_nK).any(axis=1))
    if len(known) < 2:
        return {}
    draws = [random.choice(known, len(known)) for _ in range(RESAMPLES)]
    found = [value_metrics(values_nK[rows], targets_nK[rows], classes) for rows in draws]
    names = set.intersection(*(set(metrics) for metrics in found))
    columns = {name: [metrics[name] for metrics in found] for name in sorted(names)}
    return {name: (float(np.quantile(v, 0.025)), float(np.quantile(v, 0.975))) for name, v in columns.items()}


def _regression(values_n: Floats, targets_n: Floats) -> dict[str, float]:
    from torchmetrics.functional import (
        mean_absolute_error,
        mean_squared_error,
        pearson_corrcoef,
        r2_score,
        spearman_corrcoef,
    )

    values, targets = torch.from_numpy(values_n).double(), torch.from_numpy(targets_n).double()
    # a constant has no correlation; torchmetrics would warn and give NaN
    flat = bool(values.std() < 1e-12) or bool(targets.std() < 1e-12)
    return {
        "mse": float(mean_squared_error(values, targets)),
        "mae": float(mean_absolute_error(values, targets)),
        "r2": float(r2_score(values, targets)),
        "pearson": 0.0 if flat else float(pearson_corrcoef(values, targets)),
        "spearman": 0.0 if flat else float(spearman_corrcoef(values, targets)),
        "concordance": concordance(values_n, targets_n),
    }


def concordance(values_n: Floats, targets_n: Floats) -> float:
    """Of pairs with different targets, the share that is in the right order (ties of values count half); 0.5 where no
    pair tells. From Kendall's tau-b, whose numerator is the same."""
    from scipy.stats import kendalltau

    def untied(numbers: Floats) -> float:
        _, counts = np.unique(numbers, return_counts=True)
        return float(len(numbers) * (len(numbers) - 1) - (counts * (counts - 1)).sum()) / 2

    telling, scale = untied(targets_n), untied(values_n)
    if not telling or not scale:
        return 0.5
    return 0.5 + 0.5 * float(kendalltau(values_n, targets_n).statistic) * float(np.sqrt(scale / telling))


def _class_metrics(logits_nK: Floats, targets_n: Floats) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    known = np.isfinite(targets_n)
    if not known.any():
        return {}
    logits, targets = torch.from_numpy(logits_nK[known]), torch.from_numpy(targets_n[known]).long()
    classes = logits.shape[1]
    return {
        "accuracy": float(multiclass_accuracy(logits, targets, classes, average="micro")),
        "f1": float(multiclass_f1_score(logits, targets, classes, average="macro")),
        "cross_entropy": float(torch.nn.functional.cross_entropy(logits, targets)),
        **_auroc(logits, targets),
    }


def _auroc(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Over the classes that occur; nothing where that is but one."""
    from torchmetrics.functional.classification import multiclass_auroc

    there = targets.unique()
    if len(there) < 2:
        return {}
    scores = multiclass_auroc(logits.softmax(dim=1), targets, logits.shape[1], average="none")
    return {"auroc": float(scores[there].mean())}
