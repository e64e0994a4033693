"""Heads in closed form: ridge on what a head reads, or where it may on a kernel of that, whichever answers the
validation rows better. Runs, trained baselines and probes are all fitted here.

n rows, F features (D of each of S states), K targets.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tagllm.evaluate.kernel_ridge import KernelFits, Landmarks
from tagllm.evaluate.kernel_widths import choose_widths
from tagllm.evaluate.ridge import Floats, Rows, errors_of_penalties, fit_ridge
from tagllm.head import Head, Kernel, num_states


def fit_head(head: Head, train: Rows, valid: Rows) -> Head:
    """`head` with weights in closed form of `train`; what has to be chosen is chosen as `held_out_by` says. Targets
    are in units of the data."""
    train, valid = (_standardised(rows, head) for rows in (train, valid))
    linear = fit_ridge(train, valid)
    weight_KF, bias_K = torch.from_numpy(linear.weight_KF), torch.from_numpy(linear.bias_K)
    if head.spec.kernel != "linear":
        kernel, kernel_bias_K, error = _best_kernel(head, train, valid)
        if error < linear.error:  # not so where it is no number
            return replace(head, weight_KF=torch.zeros_like(weight_KF), bias_K=kernel_bias_K, kernel=kernel)
    return replace(head, weight_KF=weight_KF, bias_K=bias_K, kernel=None)


def _best_kernel(head: Head, train: Rows, valid: Rows) -> tuple[Kernel, Tensor, float]:
    """With bias (K) and error."""
    width_SD = choose_widths(train, valid, num_states(head.spec, head.num_pools), head.spec.landmarks)
    if head.spec.landmarks < len(train.targets_nK):
        return _on_landmarks(train, valid, width_SD, head.spec.landmarks)
    return _on_every_row(train, valid, width_SD)


def _on_every_row(train: Rows, valid: Rows, width_SD: Tensor) -> tuple[Kernel, Tensor, float]:
    fit = partial(KernelFits.of, width_SD=width_SD)
    fitted = fit(train)
    error_P = errors_of_penalties(fit, fitted, train, valid)
    best = int(np.argmin(error_P))
    return fitted.kernel(best), fitted.mean_K, float(error_P[best])


def _on_landmarks(train: Rows, valid: Rows, width_SD: Tensor, number: int) -> tuple[Kernel, Tensor, float]:
    """Seen from so many of the rows, which must be far fewer: with all of them it takes far longer than the above."""
    landmarks = Landmarks.of(train.features_nF, number, width_SD)
    fit = fit_ridge(landmarks.rows(train), landmarks.rows(valid), one_scale=True)
    return landmarks.kernel(fit), torch.from_numpy(fit.bias_K), fit.error


def answers_of(head: Head, features_nF: Floats) -> Floats:
    """(n, K), in units of the data."""
    answer_nK: Floats = head.answer(torch.from_numpy(features_nF)).numpy()
    return answer_nK


def squared_errors(head: Head, values_nK: Floats, targets_nK: Floats) -> Floats:
    """(n), summed over outputs, as a regression head sees targets, standardised: 0 where there is no target, infinite
    where the answer is no number."""
    error_nK = np.nan_to_num(((values_nK - targets_nK) / head.std_K.numpy()) ** 2, nan=np.inf, posinf=np.inf)
    errors_n: Floats = np.where(np.isnan(targets_nK), 0, error_nK).sum(axis=1, dtype=np.float32)
    return errors_n


def _standardised(rows: Rows, head: Head) -> Rows:
    mean_K, std_K = head.mean_K.numpy(), head.std_K.numpy()
    return Rows(rows.features_nF, (rows.targets_nK - mean_K) / std_K)
