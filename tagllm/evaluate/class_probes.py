"""What a head of classes must beat, on the same held-out rows: how often each class is, and logistic probes on the
frozen LLM.

n rows, K classes.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from tagllm.arrays import Floats
from tagllm.config import Reads
from tagllm.evaluate.estimators import Problem, frequencies, logistic
from tagllm.evaluate.features import Features


def class_baselines(train: Features, valid: Features, held_out: Features, num_classes: int) -> dict[str, Floats]:
    """Logits (n, K) for the held-out rows: of the frequencies of the training rows, and of logistic regression on the
    hidden state right before the function tag, on the means over the fields, and on both side by side."""
    shares_K = frequencies(train.targets_nK, num_classes)
    found = {"predict_frequencies": np.repeat(shares_K[None], len(held_out.targets_nK), axis=0)}
    for reads in get_args(Reads):
        problem = Problem(train.rows(reads), valid.rows(reads), held_out.rows(reads).features_nF)
        found[f"logistic_{reads}"] = logistic(problem, num_classes)
    return {name: np.log(np.maximum(shares_nK, np.finfo(np.float32).tiny)) for name, shares_nK in found.items()}
