"""Fits of scikit-learn, with what they have to choose chosen on validation rows: ridge, logistic regression, boosted
trees.

n rows, F features, K targets or classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagllm.arrays import Doubles, Floats
from tagllm.evaluate.choosing import ENOUGH_ROWS, Rows, held_out_by

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Of ridge."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse penalties of logistic regression."""
NEVER = 1e-3
"""Rows that a class counts for which no training row has."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""A probability that is 0 in fp32 counts as this one; its logarithm would be infinite."""
RATES, MOST_TREES = (0.03, 0.1, 0.3), 1000
"""Learning rates of boosted trees to choose from, and after how many trees the slowest ends where it is not done."""
FIFTH, TENTH = 0.2, 0.1
"""Of the training rows, to choose a penalty or the number of trees by where validation has too few."""
MOST_BINS = 255
"""That boosted trees take."""


class Problem(NamedTuple):
    """Rows to fit, to choose by, and to answer. Targets (n, K), or classes (n, 1)."""

    train: Rows
    valid: Rows
    held_out_nF: Any

    def halves(self, share: float) -> tuple[Rows, Rows]:
        """What to fit and what to choose by: validation, or a share of the training rows where it has too few."""
        from sklearn.model_selection import train_test_split

        if len(self.valid.targets_nK) >= ENOUGH_ROWS:
            return self.train, self.valid
        if len(self.train.targets_nK) < 2:
            return self.train, self.train
        parts = train_test_split(np.arange(len(self.train.targets_nK)), test_size=share, random_state=0)
        fit, choose = (self.train.some(rows) for rows in parts)
        return fit, choose


def ridge(problem: Problem) -> Floats:
    """Of sparse features; fitted to all training rows, each target at the penalty that is best for it."""
    from sklearn.linear_model import Ridge

    def answer(rows: Rows, penalty_K: Doubles, wanted_nF: Any) -> Floats:
        fit = Ridge(alpha=penalty_K, solver="sparse_cg").fit(rows.features_nF, rows.targets_nK)
        values_nK: Floats = fit.predict(wanted_nF).reshape(-1, rows.targets_nK.shape[1])
        return values_nK

    fit, choose = problem.halves(FIFTH)
    penalty_PK = np.repeat(np.array(PENALTIES)[:, None], fit.targets_nK.shape[1], axis=1)
    answers = [answer(fit, penalty_K, choose.features_nF) for penalty_K in penalty_PK]
    best_K = np.argmin([np.mean((values_nK - choose.targets_nK) ** 2, axis=0) for values_nK in answers], axis=0)
    return answer(problem.train, np.array(PENALTIES)[best_K], problem.held_out_nF)


def frequencies(classes_n1: Floats, num_classes: int) -> Floats:
    """How often each class is (K); one that training rows lack is hardly ever."""
    counts_K = np.bincount(classes_n1[:, 0].astype(int), minlength=num_classes) + NEVER
    shares_K: Floats = (counts_K / counts_K.sum()).astype(np.float32)
    return shares_K


def logistic(problem: Problem, num_classes: int) -> Floats:
    """Probabilities (n, K), of dense features scaled to one variance or sparse ones to at most one."""
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MaxAbsScaler, StandardScaler

    train, valid, wanted_nF = problem
    prior_K = frequencies(train.targets_nK, num_classes)
    scaler = (MaxAbsScaler() if issparse(train.features_nF) else StandardScaler()).fit(train.features_nF)

    def answer(rows: Rows, strength: float, features_nF: Any) -> Floats:
        target_n, shares_nK = rows.targets_nK[:, 0].astype(int), np.tile(prior_K, (features_nF.shape[0], 1))
        if len(np.unique(target_n)) < 2:
            return shares_nK
        fit = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(rows.features_nF), target_n)
        shares_nK[:, fit.classes_] = fit.predict_proba(scaler.transform(features_nF))
        return shares_nK

    def error(strength: float) -> float:
        """Cross entropy."""
        pairs = held_out_by(train, valid)
        answers = [
            (answer(seen, strength, unseen.features_nF), unseen.targets_nK.astype(int)) for seen, unseen in pairs
        ]
        shares = [np.maximum(np.take_along_axis(*one, axis=1), SMALLEST) for one in answers]
        return float(np.mean([-np.log(share_n1).mean() for share_n1 in shares]))

    return answer(train, min(STRENGTHS, key=error), wanted_nF)


def boosting(problem: Problem, num_classes: int = 0) -> Floats:
    """Histogram-based gradient boosting at the best of several rates, each stopped early: values (n, K) of targets
    whose spread is about 1 (what is no gain any more is an absolute number), or probabilities of classes."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    fit, choose = problem.halves(TENTH)
    telling_G, bins = _splits(fit.features_nF.toarray())
    seen, chosen, unseen = (
        features[:, telling_G].toarray() for features in (fit.features_nF, choose.features_nF, problem.held_out_nF)
    )
    model = HistGradientBoostingClassifier if num_classes else HistGradientBoostingRegressor

    def best(target_n: NDArray[Any], chosen_n: NDArray[Any]) -> Any:
        known = np.isin(chosen_n, target_n) if num_classes else slice(None)
        fits = [
            model(learning_rate=rate, max_iter=MOST_TREES, max_bins=bins, early_stopping=True, random_state=0).fit(
                seen, target_n, X_val=chosen[known], y_val=chosen_n[known]
            )
            for rate in RATES
        ]
        return max(fits, key=lambda fit: fit.validation_score_[-1])

    if not num_classes:
        columns = zip(fit.targets_nK.T, choose.targets_nK.T, strict=True)
        return np.stack([best(*column).predict(unseen) for column in columns], axis=1)
    shares_nK = np.tile(frequencies(problem.train.targets_nK, num_classes), (len(unseen), 1))
    target_n, chosen_n = (rows.targets_nK[:, 0].astype(int) for rows in (fit, choose))
    if len(np.unique(target_n)) > 1 and np.isin(chosen_n, target_n).any():
        found = best(target_n, chosen_n)
        shares_nK[:, found.classes_] = found.predict_proba(unseen)
    return shares_nK


def _splits(features_nF: Floats) -> tuple[NDArray[np.intp], int]:
    """Features of which no two are the same, and the bins that tell their values apart. The same trees come of
    these as of all features and 255 bins, which fingerprints of few molecules make slow and many gigabytes large."""
    _, first_G = np.unique(features_nF, axis=1, return_index=True)
    distinct_G = [len(np.unique(features_nF[:, at])) for at in first_G]
    return np.sort(first_G), int(np.clip(max(distinct_G), 2, MOST_BINS))
