"""Regression on targets of which some say only that a value lies beyond a limit: a Tobit model (Tobin 1958; of two
limits, Rosett and Nelson 1975), fitted by expectation-maximisation around any fit that is linear in its targets.

n rows, K targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from tagllm.arrays import Doubles, Floats

ENOUGH, MOST_ROUNDS = 0.003, 60
"""Root mean square by which standardised targets still move when rounds end, and after how many they end anyway."""
FEW = 10
"""Held-out rows with a value that the noise can be told from."""
SMALLEST_NOISE, LARGEST_NOISE = 1e-3, 10.0
"""In standard deviations of the targets."""


class Limits(NamedTuple):
    """Which rows lie below or above what is measured (n, K), and where that ends (K), standardised."""

    below_nK: NDArray[np.bool_]
    above_nK: NDArray[np.bool_]
    low_K: Floats
    high_K: Floats


class Linear(Protocol):
    """A fit that is linear in its targets."""

    @property
    def error(self) -> float:
        """Mean squared error of targets held out."""

    def again(self, targets_nK: Floats) -> Self:
        """The same of other targets of the same rows."""

    def own_values(self) -> Floats:
        """What it answers to the rows it was fitted on (n, K)."""


Fit = TypeVar("Fit", bound=Linear)


def beyond_limits(fit: Fit, targets_nK: Floats, limits: Limits) -> Fit:
    """`fit` where targets beyond a limit are what they are expected to be, given the fit: of the values there the mean
    under normal noise as large as the error of `fit`. With Nesterov's momentum, since plain rounds take three times as
    many."""
    noise = float(np.sqrt(fit.error))
    before_nK = seen_nK = targets_nK
    for at in range(MOST_ROUNDS):
        expected_nK = _expected(fit.own_values(), targets_nK, limits, noise)
        moved = float(np.sqrt(np.mean((expected_nK - seen_nK) ** 2)))
        seen_nK = expected_nK + at / (at + 3) * (expected_nK - before_nK)
        before_nK, fit = expected_nK, fit.again(seen_nK)
        if moved < ENOUGH:
            break
    return fit


def noise_of(values_nK: Floats, targets_nK: Floats, limits: Limits, otherwise: float) -> Floats:
    """The standard deviation of targets around values (K) that makes these rows, held out, likeliest; `otherwise`
    where hardly any of them has a value. Larger than what the fit takes for noise: it does not know all the rest."""
    noise_K = np.full(targets_nK.shape[1], otherwise, np.float32)
    inside_nK = ~limits.below_nK & ~limits.above_nK
    for k in np.flatnonzero(inside_nK.sum(axis=0) >= FEW):
        apart_n, under_n, over_n = (
            column[:, k][chosen[:, k]].astype(np.float64)
            for column, chosen in (
                (targets_nK - values_nK, inside_nK),
                (limits.low_K - values_nK, limits.below_nK),
                (values_nK - limits.high_K, limits.above_nK),
            )
        )
        noise_K[k] = _likeliest_noise(apart_n, under_n, over_n)
    return noise_K


def _likeliest_noise(apart_n: Doubles, under_n: Doubles, over_n: Doubles) -> float:
    """Of rows so far from their targets, and of others so far within the limit that theirs lie beyond."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_ndtr

    def nats(log_noise: float) -> float:
        noise = np.exp(log_noise)
        inside = np.sum(apart_n**2) / (2 * noise**2) + len(apart_n) * log_noise
        return float(inside - log_ndtr(under_n / noise).sum() - log_ndtr(over_n / noise).sum())

    bounds = float(np.log(SMALLEST_NOISE)), float(np.log(LARGEST_NOISE))
    return float(np.exp(minimize_scalar(nats, bounds=bounds, method="bounded").x))


def _expected(values_nK: Floats, targets_nK: Floats, limits: Limits, noise: float) -> Floats:
    expected_nK = targets_nK.copy()
    for sign, beyond_nK, limit_K in ((-1, limits.below_nK, limits.low_K), (1, limits.above_nK, limits.high_K)):
        value = values_nK[beyond_nK]
        limit = np.broadcast_to(limit_K, values_nK.shape)[beyond_nK]
        expected_nK[beyond_nK] = value + sign * noise * _beyond(sign * (value - limit) / noise)
    return expected_nK


def _beyond(limit: NDArray[np.floating[Any]]) -> Doubles:
    """By how much the mean of standard normal noise that stays below `limit` is below 0."""
    from scipy.special import log_ndtr

    exact = limit.astype(np.float64)
    shift: Doubles = np.exp(-(exact**2) / 2 - np.log(2 * np.pi) / 2 - log_ndtr(exact))
    return shift
