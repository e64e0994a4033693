"""Ridge regression with the penalty chosen on validation rows: the honest baseline, and the head's refit.

n rows, F features, K targets, P penalties.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from tagllm.arrays import Doubles, Floats
from tagllm.evaluate.choosing import Rows, errors_of_penalties

PENALTIES = np.logspace(-1, 5, 13)


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
