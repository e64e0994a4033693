"""Ridge regression with the penalty chosen by 5-fold cross-validation: the honest baseline, and the head's refit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
PENALTIES = np.logspace(-1, 5, 13)


class RidgeFit(NamedTuple):
    """`values = features @ weight_KF.T + bias_K`."""

    weight_KF: Floats
    bias_K: Floats
    penalty: float

    def predict(self, features_nF: Floats) -> Floats:
        values: Floats = features_nF @ self.weight_KF.T + self.bias_K
        return values


def fit_ridge(features_nF: Floats, targets_nK: Floats) -> RidgeFit:
    """Fits on standardised features (folded back into the weights)."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    features = features_nF.astype(np.float64)
    center, scale = features.mean(axis=0), features.std(axis=0) + 1e-8
    folds = KFold(min(5, len(features)), shuffle=True, random_state=0)
    model = RidgeCV(alphas=PENALTIES, cv=folds, scoring="neg_mean_squared_error").fit(
        (features - center) / scale, targets_nK.astype(np.float64)
    )
    weight_KF = np.atleast_2d(model.coef_) / scale
    bias_K = np.atleast_1d(model.intercept_) - weight_KF @ center
    return RidgeFit(weight_KF.astype(np.float32), bias_K.astype(np.float32), float(model.alpha_))
