"""The widths of a kernel: one for all states, and then for each of them in turn, whichever answers held-out rows best.

States differ in how far away a row may be and still say something: a drug tells of drugs much like it, and a cell line
of little but itself.

n rows, m held out, F features (D of each of S states), K targets, P penalties.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tagllm.evaluate.kernel_ridge import PENALTIES
from tagllm.evaluate.ridge import Floats, Rows, held_out_by
from tagllm.head import anova

SPREADS = (0.1, 0.6, 4.0, 25.0, 150.0)
"""What |(x - z) / width|^2 is on average, of two rows and in each state."""
SMALLEST_DEVIATION, BOUNDLESS = 1e-7, 1e30
"""A feature that deviates by less is alike in all rows; it gets a width in which nothing is far."""
ROWS_FOR_WIDTH = 4096
"""Training rows that widths are chosen on, at most; a fit on 20,000 takes minutes."""
SOME_PENALTIES = PENALTIES[::2]
"""Enough to tell widths apart; the final fit tries all."""


def choose_widths(train: Rows, valid: Rows, num_states: int, landmarks: int) -> Tensor:
    """(S, D), of a kernel that will be seen from so many landmarks: from fewer of them, wider ones."""
    rows = len(train.targets_nK)
    number = min(rows, landmarks, ROWS_FOR_WIDTH)
    some = train.some(np.sort(np.random.default_rng(0).choice(rows, number, replace=False)))
    unit_SD = _widths(train.features_nF, num_states)
    trials = [_Trial.of(seen, unseen, unit_SD) for seen, unseen in held_out_by(some, valid)]
    error_of = dict[tuple[float, ...], float]()

    def error(spread_S: tuple[float, ...]) -> float:
        if spread_S not in error_of:
            error_P = np.mean([trial.errors(spread_S) for trial in trials], axis=0)
            error_of[spread_S] = float(error_P.min())
        return error_of[spread_S]

    best_S = min(((spread,) * num_states for spread in SPREADS), key=error)
    for at in range(num_states):
        best_S = min(((*best_S[:at], spread, *best_S[at + 1 :]) for spread in SPREADS), key=error)
    return unit_SD / torch.tensor(best_S).sqrt()[:, None]


def _widths(features_nF: Floats, num_states: int) -> Tensor:
    """(S, D) of spread 1, after the standard deviation of each feature; one that is alike in all rows tells none
    apart."""
    scale_SD = features_nF.std(axis=0, dtype=np.float64).reshape(num_states, -1)
    differs_SD = scale_SD > SMALLEST_DEVIATION
    width_SD = scale_SD * np.sqrt(2 * differs_SD.sum(axis=1, keepdims=True))
    return torch.from_numpy(np.where(differs_SD, width_SD, BOUNDLESS)).float()


class _Trial(NamedTuple):
    """Distances at spread 1, from which those at any other are had without the features."""

    among_Snn: Tensor
    across_Smn: Tensor
    targets_nK: Tensor
    answers_mK: Tensor

    @classmethod
    def of(cls, seen: Rows, unseen: Rows, unit_SD: Tensor) -> _Trial:
        center_F = seen.features_nF.mean(axis=0)

        def states(rows: Rows) -> Tensor:
            features_nSD = torch.from_numpy(rows.features_nF - center_F).reshape(-1, *unit_SD.shape)
            return (features_nSD / unit_SD).transpose(0, 1)

        seen_SnD, mean_K = states(seen), seen.targets_nK.mean(axis=0)
        targets_nK, answers_mK = (torch.from_numpy(rows.targets_nK - mean_K).float() for rows in (seen, unseen))
        return cls(torch.cdist(seen_SnD, seen_SnD), torch.cdist(states(unseen), seen_SnD), targets_nK, answers_mK)

    def errors(self, spread_S: tuple[float, ...]) -> Floats:
        """Mean squared error (P) at some of the penalties; infinite where rounding makes the system unsolvable."""
        stretch_S11 = torch.tensor(spread_S).sqrt()[:, None, None]
        among_nn, across_mn = anova(self.among_Snn * stretch_S11), anova(self.across_Smn * stretch_S11)
        error_P = np.full(len(SOME_PENALTIES), np.inf, np.float32)
        for at, penalty in enumerate(SOME_PENALTIES):
            among_nn.diagonal().fill_(1 + penalty)
            root_nn, failed = torch.linalg.cholesky_ex(among_nn)
            if not failed:
                values_mK = across_mn @ torch.cholesky_solve(self.targets_nK, root_nn)
                error_P[at] = float((values_mK - self.answers_mK).square().mean())
        return error_P
