"""Heads in closed form: ridge on what a head reads, or where it may on a kernel of that, whichever answers the
validation rows better. Runs, trained baselines and probes are all fitted here.

n rows, F features (D of each of S states), K targets.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tagllm.arrays import Floats
from tagllm.evaluate.censored import Limits, beyond_limits, noise_of
from tagllm.evaluate.choosing import Rows, clearly_better, errors_of_penalties
from tagllm.evaluate.kernel_ridge import KernelFit, KernelFits, LandmarkFit, Nystroem
from tagllm.evaluate.kernel_widths import choose_widths
from tagllm.evaluate.ridge import RidgeFit, fit_ridge
from tagllm.head import Head, States, num_states

FIT_ROWS = 20_000
"""Closed-form fits look at so many training rows at most."""


def fit_head(head: Head, train: Rows, valid: Rows) -> Head:
    """`head` with weights in closed form of `train`; what has to be chosen is chosen as `held_out_by` says, as if no
    target were censored. Targets are in units of the data."""
    limits, limits_held_out = (_limits(rows, head) for rows in (train, valid))
    train, valid = (_standardised(rows, head) for rows in (train, valid))
    fit: RidgeFit | KernelFit | LandmarkFit = fit_ridge(train, valid)
    if head.spec.kernel != "linear":
        kernel = _best_kernel(head, train, valid)
        if kernel.error < fit.error:  # not so where it is no number
            fit = kernel
    if not head.spec.censored:
        return _filled(head, fit)
    latent = _filled(head, beyond_limits(fit, train.targets_nK, limits))
    values_nK = latent.values(torch.from_numpy(valid.features_nF)).numpy()
    noise_K = noise_of(values_nK, valid.targets_nK, limits_held_out, otherwise=fit.error**0.5)
    return replace(latent, noise_K=torch.from_numpy(noise_K))


def _filled(head: Head, fit: RidgeFit | KernelFit | LandmarkFit) -> Head:
    if isinstance(fit, RidgeFit):
        weight_KF, bias_K = torch.from_numpy(fit.weight_KF), torch.from_numpy(fit.bias_K)
        return replace(head, weight_KF=weight_KF, bias_K=bias_K, kernel=None)
    return replace(head, weight_KF=torch.zeros_like(head.weight_KF), bias_K=fit.bias_K, kernel=fit.kernel())


def _best_kernel(head: Head, train: Rows, valid: Rows) -> KernelFit | LandmarkFit:
    """The state of the tag is left out where validation rows are clearly answered better by the fields alone, with
    widths of their own: a state that tells nothing new is one more way in which rows are unlike. Few training rows do
    not show it, so both are fitted on all."""
    fit = _fit_kernel(head, train, valid)
    if head.spec.reads != "both" or not len(valid.targets_nK):
        return fit
    alone = _fit_kernel(head, *(_without_tag(rows, head) for rows in (train, valid)))
    errors, errors_alone = (_errors(_filled(head, one), valid) for one in (fit, alone))
    return alone if clearly_better(errors_alone, errors) else fit


def _without_tag(rows: Rows, head: Head) -> Rows:
    """With a state of the tag, the first, in which all rows are alike."""
    features_nF = rows.features_nF.copy()
    features_nF[:, : features_nF.shape[1] // num_states(head.spec, len(head.pools))] = 0
    return Rows(features_nF, rows.targets_nK)


def _errors(head: Head, rows: Rows) -> Floats:
    """Of standardised targets."""
    values_nK = head.values(torch.from_numpy(rows.features_nF)).numpy()
    errors_n: Floats = ((values_nK - rows.targets_nK) ** 2).mean(axis=1)
    return errors_n


def _fit_kernel(head: Head, train: Rows, valid: Rows) -> KernelFit | LandmarkFit:
    """Seen from landmarks only where these are far fewer than the rows: from all of them it takes far longer."""
    similar = choose_widths(train, valid, States.of(head.spec, head.pools), head.spec.landmarks)
    if head.spec.landmarks < len(train.targets_nK):
        landmarks = Nystroem.of(train.features_nF, head.spec.landmarks, similar)
        return LandmarkFit(landmarks, fit_ridge(landmarks.rows(train), landmarks.rows(valid), one_scale=True))
    fit = partial(KernelFits.of, similar=similar)
    fitted = fit(train)
    error_P = errors_of_penalties(fit, fitted, train, valid)
    best = int(np.argmin(error_P))
    return fitted.fit(best, train.targets_nK, float(error_P[best]))


def predictions_of(head: Head, features_nF: Floats) -> Floats:
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


def _limits(rows: Rows, head: Head) -> Limits:
    below, above = head.spec.censored_below, head.spec.censored_above
    low, high = -np.inf if below is None else below, np.inf if above is None else above
    mean_K, std_K = head.mean_K.numpy(), head.std_K.numpy()
    targets_nK = rows.targets_nK
    return Limits(targets_nK <= low, targets_nK >= high, (low - mean_K) / std_K, (high - mean_K) / std_K)
