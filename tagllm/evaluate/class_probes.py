"""What a head of classes must beat, on the same held-out rows: how often each class is, and logistic probes on the
frozen LLM.

n rows, F features, K classes.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from tagllm.config import Reads
from tagllm.evaluate.features import Features
from tagllm.evaluate.passes import Floats
from tagllm.evaluate.ridge import Rows, held_out_by

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties of a probe."""
NEVER = 1e-3
"""Rows that a class counts for which no training row has."""


def class_baselines(train: Features, valid: Features, held_out: Features, num_classes: int) -> dict[str, Floats]:
    """Logits (n, K) for the held-out rows: of the frequencies of the training rows, and of logistic regression on the
    hidden state right before the function tag, on the means over the fields, and on both side by side. The penalty is
    chosen as `held_out_by` says."""
    counts_K = np.bincount(train.targets_nK[:, 0].astype(int), minlength=num_classes) + NEVER
    logits_K = np.log(counts_K / counts_K.sum()).astype(np.float32)
    found = {"predict_frequencies": np.repeat(logits_K[None], len(held_out.targets_nK), axis=0)}
    for reads in get_args(Reads):
        rows = train.rows(reads), valid.rows(reads)
        found[f"logistic_{reads}"] = _logistic(*rows, held_out.rows(reads).features_nF, logits_K)
    return found


def _logistic(train: Rows, valid: Rows, wanted_nF: Floats, prior_K: Floats) -> Floats:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.features_nF)

    def answer(rows: Rows, strength: float, features_nF: Floats) -> Floats:
        target_n, logits_nK = rows.targets_nK[:, 0].astype(int), np.tile(prior_K, (len(features_nF), 1))
        if len(np.unique(target_n)) < 2:
            return logits_nK
        fit = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(rows.features_nF), target_n)
        logits_nK[:, fit.classes_] = fit.predict_log_proba(scaler.transform(features_nF))
        return logits_nK

    def error(strength: float) -> float:
        """Cross entropy."""
        pairs = held_out_by(train, valid)
        answers = [
            (answer(seen, strength, unseen.features_nF), unseen.targets_nK.astype(int)) for seen, unseen in pairs
        ]
        return float(np.mean([-np.take_along_axis(*one, axis=1).mean() for one in answers]))

    return answer(train, min(STRENGTHS, key=error), wanted_nF)
