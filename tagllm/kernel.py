"""A kernel on what heads read of rows: how alike rows are to landmarks, rows of the training data.

S states of D features each (F = S D), M landmarks with T distinct states, B rows, K outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BOUNDLESS = 1e30
"""A width in which nothing is far."""
ROWS_AT_ONCE = 128
"""Beside 20,000 landmarks, 10 MB: what is computed of them stays in a core's cache."""


class Landmarks(NamedTuple):
    """Each distinct state is kept once, and compared with once: a drug that stands in a thousand rows has one."""

    state_TD: Tensor
    at_SM: Tensor
    """Which of them each landmark has as each of its states."""

    @classmethod
    def of(cls, features_MF: Tensor, num_states: int) -> Landmarks:
        states_XD = features_MF.reshape(len(features_MF) * num_states, -1).numpy()
        first: dict[bytes, int] = {}
        same_X = [first.setdefault(blake2b(state_D).digest(), at) for at, state_D in enumerate(states_XD)]
        distinct_T, at_X = np.unique(same_X, return_inverse=True)
        at_SM = torch.from_numpy(at_X).reshape(-1, num_states).T.contiguous()
        return cls(torch.from_numpy(states_XD[distinct_T]), at_SM)

    def in_order(self, order_S: Sequence[int]) -> Landmarks:
        return self._replace(at_SM=self.at_SM[list(order_S)])


class _Compared(NamedTuple):
    """One state of the landmarks, its V distinct values in widths."""

    center_D: Tensor
    width_D: Tensor
    value_VD: Tensor
    at_M: Tensor

    @classmethod
    def of(cls, landmarks: Landmarks, state: int, width_D: Tensor) -> _Compared:
        used_V, at_M = landmarks.at_SM[state].unique(return_inverse=True)
        value_VD = landmarks.state_TD[used_V]
        center_D = value_VD.mean(dim=0)  # states have an offset far larger than what tells them apart
        return cls(center_D, width_D, (value_VD - center_D) / width_D, at_M)

    def with_rows(self, state_BD: Tensor) -> Tensor:
        """How alike they are (B, M)."""
        alike_BV = matern(torch.cdist((state_BD - self.center_D) / self.width_D, self.value_VD))
        return alike_BV[:, self.at_M]


def similarity_parts(features_BF: Tensor, landmarks: Landmarks, width_SD: Tensor) -> Iterator[Tensor]:
    """(B, M) by ROWS_AT_ONCE, 1 for a row and itself: an ANOVA kernel, the mean over all sets of states of the product
    over the set of `matern` of |(x - landmark) / width|. So each state counts by itself (a drug is potent, whatever
    the protein) and together with others (additive Gaussian processes, Duvenaud et al. 2011)."""
    compared = [_Compared.of(landmarks, state, width_D) for state, width_D in enumerate(width_SD)]
    for some_bF in features_BF.split(ROWS_AT_ONCE):
        states = some_bF.reshape(-1, *width_SD.shape).unbind(dim=1)
        yield anova([one.with_rows(state_bD) for one, state_bD in zip(compared, states, strict=True)])


def matern(apart: Tensor) -> Tensor:
    """Matern 3/2 of distances r in widths: (1 + sqrt(3) r) exp(-sqrt(3) r)."""
    far = 3**0.5 * apart
    return (1 + far) * torch.exp(-far)


def anova(alike_S: Sequence[Tensor]) -> Tensor:
    """Of how alike rows are in each state."""
    product = 1 + alike_S[0]
    for alike in alike_S[1:]:
        product = product * (1 + alike)
    return (product - 1) / float(2 ** len(alike_S) - 1)


class Kernel(NamedTuple):
    """A kernel on landmarks, one width for each feature of each state."""

    state_TD: Tensor
    at_SM: Tensor
    width_SD: Tensor
    weight_KM: Tensor

    def __call__(self, features_BF: Tensor) -> Tensor:
        """(B, K)."""
        parts = similarity_parts(features_BF, Landmarks(self.state_TD, self.at_SM), self.width_SD)
        return torch.cat([similar_bM @ self.weight_KM.T for similar_bM in parts])
