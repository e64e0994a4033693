"""Heads in closed form: ridge on what a head reads, or where it may on a Gaussian kernel of that, whichever answers the
validation rows better. Runs, trained baselines and probes are all fitted here.

n rows, F features, K targets, M landmarks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tagllm.evaluate.kernel_ridge import KernelFits
from tagllm.evaluate.ridge import Floats, RidgeFit, Rows, errors_of_penalties, fit_ridge
from tagllm.head import Head, Kernel, similarity

SPREADS = (0.5, 1.5, 5.0)
"""c of the kernel exp(-c |x - z|^2 / s), where s is what |x - z|^2 is on average."""


JITTER = 1e-7
"""Added to the similarity of each landmark to itself, times their number, so that landmarks alike do no harm."""


class Landmarks(NamedTuple):
    """The Nystroem features of a kernel: (x, y) -> features whose products are the similarities, as seen from M rows
    (Williams and Seeger 2001)."""

    at_MF: Tensor
    width_F: Tensor
    root_MM: Tensor
    """Cholesky factor of the similarities among landmarks, fp64."""

    @classmethod
    def of(cls, features_nF: Floats, number: int, width_F: Tensor) -> Landmarks:
        """So many of these rows, drawn evenly."""
        chosen = np.random.default_rng(0).choice(len(features_nF), number, replace=False)
        at_MF = torch.from_numpy(features_nF[np.sort(chosen)])
        exact_MF = at_MF.double()
        among_MM = similarity(exact_MF, exact_MF, width_F.double())
        root_MM = torch.linalg.cholesky(among_MM + JITTER * len(at_MF) * torch.eye(len(at_MF)))
        return cls(at_MF, width_F, root_MM)

    def rows(self, rows: Rows) -> Rows:
        seen_Mn = similarity(torch.from_numpy(rows.features_nF), self.at_MF, self.width_F).T.double()
        features_Mn = torch.linalg.solve_triangular(self.root_MM, seen_Mn, upper=False)
        return Rows(features_Mn.T.numpy(), rows.targets_nK)

    def kernel(self, fit: RidgeFit) -> Kernel:
        """Its answers but for the bias."""
        weight_MK = torch.from_numpy(fit.weight_KF.T).double()
        weight_MK = torch.linalg.solve_triangular(self.root_MM.T, weight_MK, upper=True)
        return Kernel(self.at_MF, self.width_F, weight_MK.T.float().contiguous())


def fit_head(head: Head, train: Rows, valid: Rows) -> Head:
    """`head` with weights in closed form of `train`; what has to be chosen is chosen as `errors_of_penalties` says.
    Targets are in units of the data."""
    train, valid = (_standardised(rows, head) for rows in (train, valid))
    linear = fit_ridge(train, valid)
    weight_KF, bias_K = torch.from_numpy(linear.weight_KF), torch.from_numpy(linear.bias_K)
    best, lowest = replace(head, weight_KF=weight_KF, bias_K=bias_K, kernel=None), linear.error
    for spread in SPREADS if head.spec.kernel == "rbf" else ():
        width_F = _widths(train.features_nF, spread)
        fit = _on_every_row if head.spec.landmarks >= len(train.targets_nK) else _on_landmarks
        kernel, bias_K, error = fit(train, valid, width_F, head.spec.landmarks)
        if error < lowest:
            best, lowest = replace(head, weight_KF=torch.zeros_like(weight_KF), bias_K=bias_K, kernel=kernel), error
    return best


def _on_every_row(train: Rows, valid: Rows, width_F: Tensor, number: int) -> tuple[Kernel, Tensor, float]:
    """With bias (K) and error; as `_on_landmarks` with all of them, which would take far longer where they are many."""
    fit = partial(KernelFits.of, width_F=width_F)
    fitted = fit(train)
    error_P = errors_of_penalties(fit, fitted, train, valid)
    best = int(np.argmin(error_P))
    return fitted.kernel(best), fitted.mean_K, float(error_P[best])


def _on_landmarks(train: Rows, valid: Rows, width_F: Tensor, number: int) -> tuple[Kernel, Tensor, float]:
    landmarks = Landmarks.of(train.features_nF, number, width_F)
    fit = fit_ridge(landmarks.rows(train), landmarks.rows(valid), one_scale=True)
    return landmarks.kernel(fit), torch.from_numpy(fit.bias_K), fit.error


def _widths(features_nF: Floats, spread: float) -> Tensor:
    """(F), after the spread of each feature."""
    scale_F = features_nF.std(axis=0) + 1e-8
    return torch.from_numpy(scale_F * np.sqrt(2 * len(scale_F) / spread)).float()


def answers_of(head: Head, features_nF: Floats) -> Floats:
    """(n, K), in units of the data."""
    answer_nK: Floats = head.answer(torch.from_numpy(features_nF)).numpy()
    return answer_nK


def _standardised(rows: Rows, head: Head) -> Rows:
    mean_K, std_K = head.mean_K.numpy(), head.std_K.numpy()
    return Rows(rows.features_nF, (rows.targets_nK - mean_K) / std_K)
