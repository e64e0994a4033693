"""Ridge regression with the penalty chosen on validation rows: the honest baseline, and the head's refit.

n rows, F features, K targets, P penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tagllm.arrays import Doubles, Floats

PENALTIES = np.logspace(-1, 5, 13)
ENOUGH_ROWS = 200
"""Validation rows that a penalty can be chosen on."""


def clearly_better(error_n: Floats, than_n: Floats) -> bool:
    """Whether errors of rows are lower than others of the same rows by more than one standard error of their mean.

    A choice by the mean alone is by luck where rows are few: of 32 validation rows a head of two steps was .09 better
    than the fit of its state, and half as good on others. One row says nothing.
    """
    sound, than_sound = (bool(np.isfinite(errors).all()) for errors in (error_n, than_n))
    if not (sound and than_sound):  # answers that are no numbers
        return sound
    gain_n = (than_n - error_n).astype(np.float64)
    return len(gain_n) > 1 and bool(gain_n.mean() > gain_n.std(ddof=1) / np.sqrt(len(gain_n)))


class Rows(NamedTuple):
    """What a fit sees, and what it is to answer."""

    features_nF: Any
    """Of numpy; sparse ones of scipy for fits that take them."""
    targets_nK: Floats

    def some(self, chosen: NDArray[Any] | slice) -> Rows:
        """Those of a mask, with these numbers, or in a slice."""
        return Rows(self.features_nF[chosen], self.targets_nK[chosen])


class RidgeFit(NamedTuple):
    """`values = features @ weight_KF.T + bias_K`."""

    weight_KF: Floats
    bias_K: Floats
    penalty: float
    error: float
    """Mean squared error by which the penalty was chosen."""
    system: RidgeSystem

    def again(self, targets_nK: Floats) -> RidgeFit:
        """Of other targets of the same rows."""
        weight_FK, bias_K = self.system.solve(targets_nK, self.penalty)
        return self._replace(weight_KF=weight_FK.T.astype(np.float32), bias_K=bias_K.astype(np.float32))

    def own_values(self) -> Floats:
        """What it answers to the rows it was fitted on (n, K)."""
        return self.system.values(self.weight_KF, self.bias_K)


class Fits(Protocol):
    """One model at every penalty."""

    def errors(self, held_out: Rows) -> Doubles:
        """Mean squared error (P) on held-out rows."""


def held_out_by(train: Rows, valid: Rows) -> list[tuple[Rows, Rows]]:
    """What to fit on and what to score, by which to choose: `train` and `valid`; where the latter are fewer than
    ENOUGH_ROWS, 5-fold cross-validation on `train`.

    Validation rows first, since folds of rows are easier than what is asked where rows are related: pairs of drugs
    that stand in several folds ask for a penalty far too weak for pairs never seen.
    """
    if len(valid.targets_nK) >= ENOUGH_ROWS:
        return [(train, valid)]
    if len(train.targets_nK) < 2:
        return [(train, train)]  # nothing can be held out
    from sklearn.model_selection import KFold

    folds = KFold(min(5, len(train.targets_nK)), shuffle=True, random_state=0).split(train.features_nF)
    return [(train.some(seen), train.some(unseen)) for seen, unseen in folds]


def errors_of_penalties(fit: Callable[[Rows], Fits], fitted: Fits, train: Rows, valid: Rows) -> Doubles:
    """By which to choose (P), on rows as `held_out_by` says; `fitted` is `fit(train)`, which is not done twice."""
    pairs = held_out_by(train, valid)
    error_P: Doubles = np.mean([(fitted if seen is train else fit(seen)).errors(rest) for seen, rest in pairs], axis=0)
    return error_P


def fit_ridge(train: Rows, valid: Rows, one_scale: bool = False) -> RidgeFit:
    """Fits on standardised features (folded back into the weights), with the best penalty as `errors_of_penalties`
    says. `one_scale` keeps features as large as they are beside each other."""
    fit = partial(RidgeFits.of, one_scale=one_scale)
    fitted = fit(train)
    error_P = errors_of_penalties(fit, fitted, train, valid)
    best = int(np.argmin(error_P))
    weight_KF, bias_K = fitted.weight_PFK[best].T.astype(np.float32), fitted.bias_PK[best].astype(np.float32)
    return RidgeFit(weight_KF, bias_K, float(PENALTIES[best]), float(error_P[best]), fitted.system)


class RidgeSystem:
    """For any targets and penalty, of one eigendecomposition."""

    def __init__(self, features_nF: Floats, one_scale: bool) -> None:
        exact_nF = features_nF.astype(np.float64)
        self.center_F, self.scale_F = exact_nF.mean(axis=0), exact_nF.std(axis=0) + 1e-8
        if one_scale:
            self.scale_F = np.full_like(self.scale_F, np.sqrt((self.scale_F**2).mean()))
        self.standard_nF = (exact_nF - self.center_F) / self.scale_F
        self.size_F, self.basis_FF = np.linalg.eigh(self.standard_nF.T @ self.standard_nF)

    def solve(self, targets_nK: Floats, penalty: float) -> tuple[Doubles, Doubles]:
        """Weights (F, K) and bias (K), for features as they are."""
        mean_K = targets_nK.mean(axis=0, dtype=np.float64)
        onto_FK = self.basis_FF.T @ (self.standard_nF.T @ (targets_nK - mean_K))
        shrunk_F = 1 / (np.maximum(self.size_F, 0) + penalty)
        weight_FK = self.basis_FF @ (shrunk_F[:, None] * onto_FK) / self.scale_F[:, None]
        return weight_FK, mean_K - self.center_F @ weight_FK

    def values(self, weight_KF: Floats, bias_K: Floats) -> Floats:
        """Of its own rows (n, K)."""
        values_nK: Doubles = self.standard_nF @ (self.scale_F * weight_KF).T + (self.center_F @ weight_KF.T + bias_K)
        return values_nK.astype(np.float32)


class RidgeFits(NamedTuple):
    """At every penalty."""

    weight_PFK: Doubles
    bias_PK: Doubles
    system: RidgeSystem

    @classmethod
    def of(cls, rows: Rows, one_scale: bool) -> RidgeFits:
        system = RidgeSystem(rows.features_nF, one_scale)
        weights, biases = zip(*(system.solve(rows.targets_nK, penalty) for penalty in PENALTIES), strict=True)
        return cls(np.stack(weights), np.stack(biases), system)

    def errors(self, held_out: Rows) -> Doubles:
        values_PnK = held_out.features_nF.astype(np.float64) @ self.weight_PFK + self.bias_PK[:, None]
        error_P: Doubles = ((values_PnK - held_out.targets_nK) ** 2).mean(axis=(1, 2))
        return error_P
