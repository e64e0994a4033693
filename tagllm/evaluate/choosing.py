"""By which rows a fit is chosen: those held out, or folds of the training rows where they are few.

n rows, F features, K targets, P penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tagllm.arrays import Doubles, Floats

ENOUGH_ROWS = 200
"""Validation rows that a penalty can be chosen on."""


class Rows(NamedTuple):
    """What a fit sees, and what it is to answer."""

    features_nF: Any
    """Of numpy; sparse ones of scipy for fits that take them."""
    targets_nK: Floats

    def some(self, chosen: NDArray[Any] | slice) -> Rows:
        """Those of a mask, with these numbers, or in a slice."""
        return Rows(self.features_nF[chosen], self.targets_nK[chosen])


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
