"""What a head must beat, on the same held-out rows: the training mean, and ridge probes on the frozen LLM."""

from __future__ import annotations

import numpy as np

from tagllm.evaluate.metrics import value_metrics
from tagllm.evaluate.passes import Pass
from tagllm.evaluate.ridge import fit_ridge

PROBE_ROWS = 5000


def value_baselines(train: Pass, held_out: Pass) -> dict[str, dict[str, float]]:
    """Metrics of predict-the-mean and of ridge on the hidden state right before the function tag (`ridge_last`),
    averaged over the fields (`ridge_mean`), or both side by side; penalties by 5-fold cross-validation on the training
    rows."""
    targets = train.targets_nK
    mean = np.broadcast_to(targets.mean(axis=0), held_out.targets_nK.shape).astype(np.float32)
    found = {"predict_mean": value_metrics(mean, held_out.targets_nK, classes=False)}
    probes = {
        "ridge_last": (train.prefix_last_nD, held_out.prefix_last_nD),
        "ridge_mean": (train.mean_nD, held_out.mean_nD),
        "ridge_both": (
            np.concatenate([train.prefix_last_nD, train.mean_nD], axis=1),
            np.concatenate([held_out.prefix_last_nD, held_out.mean_nD], axis=1),
        ),
    }
    for name, (seen, unseen) in probes.items():
        fit = fit_ridge(seen, targets)
        found[name] = value_metrics(fit.predict(unseen), held_out.targets_nK, classes=False) | {"penalty": fit.penalty}
    return found
