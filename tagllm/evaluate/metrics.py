"""Metrics of held-out predictions, from torchmetrics and scipy.

n rows, K outputs, R draws of m rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tagllm.arrays import Doubles, Floats
from tagllm.evaluate.metric_kinds import without_head

RESAMPLES = 500
NUMBERS_AT_ONCE = 10_000_000
"""Of several draws, to be measured together: what bounds memory."""


def value_metrics(values_nK: Floats, targets_nK: Floats, classes: bool, names: Sequence[str] = ()) -> dict[str, float]:
    """Regression: MSE, MAE, R2 (not where all targets are alike), Pearson, Spearman, concordance index, averaged over
    outputs; of one row MSE and MAE alone. Classes: accuracy, macro F1, AUROC (macro, one against the rest), cross
    entropy.

    Rows whose target is missing (NaN) do not count; nothing is returned where no row has one.

    Args:
        names: of all outputs. Where these are several, each has metrics of its own too (`weight/mse`): a mean over
            outputs in different units tells of the largest.
    """
    if classes:
        return _class_metrics(values_nK, targets_nK[:, 0])
    found = _regression(values_nK, targets_nK, np.arange(len(targets_nK))[None], names)
    return {name: float(value_R[0]) for name, value_R in found.items() if not _is_r2(name) or np.isfinite(value_R[0])}


def _is_r2(name: str) -> bool:
    return without_head(name) == "r2"


def intervals(
    values_nK: Floats, targets_nK: Floats, classes: bool, names: Sequence[str] = ()
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of `value_metrics` over the rows (percentiles of `RESAMPLES` draws): how much another
    draw of held-out rows would change them. Rows that lack the same targets are drawn among each other. AUROC is of the
    draws that have two classes, R2 of those that have two targets."""
    known_nK = np.isfinite(targets_nK)
    if known_nK.any(axis=1).sum() < 2:
        return {}
    random = np.random.default_rng(0)
    _, kind_n = np.unique(known_nK, axis=0, return_inverse=True)
    alike = [np.flatnonzero(kind_n.ravel() == kind) for kind in range(kind_n.max() + 1)]
    parts: list[dict[str, Doubles]] = []
    most = max(1, NUMBERS_AT_ONCE // len(known_nK))
    for start in range(0, RESAMPLES, most):
        size = min(most, RESAMPLES - start)
        draws_Rm = np.concatenate([random.choice(rows, (size, len(rows))) for rows in alike], axis=1)
        if classes:
            each = [_class_metrics(values_nK[rows], targets_nK[rows, 0]) for rows in draws_Rm]
            parts += [{name: np.array([value]) for name, value in of_draw.items()} for of_draw in each]
        else:
            parts.append(_regression(values_nK, targets_nK, draws_Rm, names))
    metrics = dict.fromkeys(name for part in parts for name in part)
    found = {name: np.concatenate([part[name] for part in parts if name in part]) for name in metrics}
    for name in filter(_is_r2, metrics):
        found[name] = found[name][~np.isnan(found[name])]
    return {name: _between(of_draws) for name, of_draws in found.items() if len(of_draws)}


def _between(of_draws: Doubles) -> tuple[float, float]:
    """Where 95 % of the draws are; infinite ones are draws too, but there is nothing between two of them."""
    method: Literal["linear", "nearest"] = "linear" if np.isfinite(of_draws).all() else "nearest"
    low, high = np.quantile(of_draws, [0.025, 0.975], method=method)
    return float(low), float(high)


def _regression(
    values_nK: Floats, targets_nK: Floats, draws_Rm: NDArray[np.intp], names: Sequence[str]
) -> dict[str, Doubles]:
    """Of each draw of rows (R), averaged over the outputs that have it, and of each that has a name; all draws lack the
    same targets at the same places."""
    per_output: list[dict[str, Doubles]] = []
    for values_n, targets_n in zip(values_nK.T, targets_nK.T, strict=True):
        rows_Rm = draws_Rm[:, np.isfinite(targets_n[draws_Rm[0]])]
        known = rows_Rm.shape[1] > 0
        pair = values_n[rows_Rm.T].astype(float), targets_n[rows_Rm.T].astype(float)
        per_output.append(_of_columns(*pair) if known else {})
    metrics = max(per_output, key=len, default={})
    means = {metric: np.mean([one[metric] for one in per_output if metric in one], axis=0) for metric in metrics}
    named = zip(names, per_output, strict=True) if names and len(per_output) > 1 else []
    return means | {f"{name}/{metric}": value_R for name, one in named for metric, value_R in one.items()}


def _of_columns(values_mR: Doubles, targets_mR: Doubles) -> dict[str, Doubles]:
    from scipy.stats import rankdata
    from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score

    values, targets = torch.from_numpy(values_mR), torch.from_numpy(targets_mR)
    m, R = values.shape
    errors = {
        "mse": mean_squared_error(values, targets, num_outputs=R).reshape(R).numpy(),
        "mae": mean_absolute_error(values, targets, num_outputs=R).reshape(R).numpy(),
    }
    if m < 2:
        return errors
    scale_R = targets.std(dim=0, correction=0)  # r2_score takes residuals of 1e-4 in all for none
    scale_R[scale_R == 0] = torch.nan
    return errors | {
        "r2": r2_score(values / scale_R, targets / scale_R, multioutput="raw_values").reshape(R).numpy(),
        "pearson": _correlation(values_mR, targets_mR),
        "spearman": _correlation(*(rankdata(x, axis=0) for x in (values_mR, targets_mR))),
        "concordance": concordance(values_mR, targets_mR),
    }


def _correlation(values_mR: Doubles, targets_mR: Doubles) -> Doubles:
    """Pearson's; 0 where either is constant, NaN where one is not finite."""
    from torchmetrics.functional import pearson_corrcoef

    finite_R = np.isfinite(values_mR).all(axis=0)
    varied, found_R = finite_R.copy(), np.where(finite_R, 0.0, np.nan)
    for x_mR in (values_mR, targets_mR):
        varied &= x_mR.max(axis=0) > x_mR.min(axis=0)
    if varied.any():
        pair = (torch.from_numpy(_standardised(x[:, varied])) for x in (values_mR, targets_mR))
        found_R[varied] = np.atleast_1d(pearson_corrcoef(*pair).numpy())
    return found_R


def _standardised(x_mR: Doubles) -> Doubles:
    """torchmetrics has an absolute bound for what varies, which small units are below."""
    standard_mR: Doubles = (x_mR - x_mR.mean(axis=0)) / x_mR.std(axis=0)
    return standard_mR


def concordance(values_mR: Doubles, targets_mR: Doubles) -> Doubles:
    """Of pairs with different targets, the share that is in the right order (ties of values count half); 0.5 where no
    pair tells. From Kendall's tau-b, whose numerator is the same."""
    from scipy.stats import kendalltau

    telling_R, scale_R = (_untied(x) for x in (targets_mR, values_mR))
    found_R = np.full(len(telling_R), 0.5)
    for at in np.flatnonzero(telling_R * scale_R):
        tau = kendalltau(values_mR[:, at], targets_mR[:, at]).statistic
        found_R[at] += 0.5 * tau * np.sqrt(scale_R[at] / telling_R[at])
    return found_R


def _untied(x_mR: Doubles) -> Doubles:
    """Pairs that differ."""
    from scipy.stats import rankdata

    m = len(x_mR)
    alike_mR = rankdata(x_mR, method="max", axis=0) - rankdata(x_mR, method="min", axis=0)  # how many others are equal
    pairs_R: Doubles = (m * (m - 1) - alike_mR.sum(axis=0)) / 2
    return pairs_R


def _class_metrics(logits_nK: Floats, targets_n: Floats) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    known = np.isfinite(targets_n)
    if not known.any():
        return {}
    logits, targets = torch.from_numpy(logits_nK[known]), torch.from_numpy(targets_n[known]).long()
    classes = logits.shape[1]
    return {
        "accuracy": float(multiclass_accuracy(logits, targets, classes, average="micro")),
        "f1": float(multiclass_f1_score(logits, targets, classes, average="macro")),
        "cross_entropy": float(torch.nn.functional.cross_entropy(logits, targets)),
        **_auroc(logits, targets),
    }


def _auroc(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Over the classes that occur; nothing where that is but one."""
    from torchmetrics.functional.classification import binary_auroc

    there = targets.unique()
    if len(there) < 2:
        return {}
    ranks_nK = _ranks_of_odds(logits)
    return {"auroc": float(np.mean([float(binary_auroc(ranks_nK[:, at], (targets == at).long())) for at in there]))}


def _ranks_of_odds(logits_nK: torch.Tensor) -> torch.Tensor:
    """Of each class against the others, from 0 to 1: probabilities of a sure head are all 1 in fp32, odds are not."""
    logits_nK, odds_Kn = logits_nK.double(), []
    for at in range(logits_nK.shape[1]):
        others = torch.cat([logits_nK[:, :at], logits_nK[:, at + 1 :]], dim=1)
        odds_Kn.append(logits_nK[:, at] - others.logsumexp(dim=1))
    ranks_Kn = [odds_n.unique(return_inverse=True)[1].double() for odds_n in odds_Kn]
    return torch.stack([ranks_n / ranks_n.max().clamp(min=1) for ranks_n in ranks_Kn], dim=1)
