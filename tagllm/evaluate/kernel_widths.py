"""The widths of a kernel: one for all states, and then for each of them in turn, whichever has the least product of two
errors: of the held-out rows, and of the training rows, each answered by a fit on the others.

A few hundred held-out rows choose by chance; of 300 the isoelectric point got a width that cost a fifth of its error.
Training rows are many, but easier than what is asked where rows are related, as pairs of the same drugs are, and a tag
was trained on them. So both are asked (results/notes.md, "Few rows to choose a width by").

States differ in how far away a row may be and still say something: a drug tells of drugs much like it, and a cell line
of little but itself.

n rows, m held out, F features (D of each of S states), K targets, P penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tagllm.arrays import Floats
from tagllm.evaluate.choosing import Rows, held_out_by
from tagllm.evaluate.kernel_ridge import PENALTIES, Similarity
from tagllm.head import States
from tagllm.kernel import BOUNDLESS, anova, matern

SPREADS = (0.1, 0.6, 4.0, 25.0, 150.0)
"""What |(x - z) / width|^2 is on average, of two rows and in each state."""
SMALLEST_DEVIATION = 1e-7
"""A feature that deviates by less is alike in all rows; it gets a boundless width."""
ROWS_FOR_WIDTH = 4096
"""Training rows that widths are chosen on, at most; a fit on 20,000 takes minutes."""
ALIKE = 1e-3
"""Rows whose similarity, at spread 1 and beside that of each to itself, lacks less of 1 are taken for the same: each of
them would answer the other when that is left out."""
FEW = 32
"""Rows at a time that are compared with all others."""
SOME_PENALTIES = PENALTIES[::2]
"""Enough to tell widths apart; the final fit tries all."""


def choose_widths(train: Rows, valid: Rows, states: States, landmarks: int) -> Similarity:
    """With a width for each kind of state, of a kernel that will be seen from so many landmarks: from fewer of them,
    wider ones."""
    rows = len(train.targets_nK)
    number = min(rows, landmarks, ROWS_FOR_WIDTH)
    some = train.some(np.sort(np.random.default_rng(0).choice(rows, number, replace=False)))
    unit_SD = _widths(train.features_nF, states.kinds)
    trials = [_Trial.of(seen, unseen, unit_SD, states.orders).once() for seen, unseen in held_out_by(some, valid)]
    error_of = dict[tuple[float, ...], float]()

    def error(spread_S: tuple[float, ...]) -> float:
        if spread_S not in error_of:
            found = [trial.errors(spread_S) for trial in trials]
            error_P = np.mean([errors.held_out_P for errors in found], axis=0)
            error_of[spread_S] = float(error_P.min() * np.mean([errors.left_out for errors in found]))
        return error_of[spread_S]

    def with_one(spread_S: tuple[float, ...], kind: int, spread: float) -> tuple[float, ...]:
        pairs = zip(spread_S, states.kinds, strict=True)
        return tuple(spread if other == kind else before for before, other in pairs)

    best_S = min(((spread,) * len(states.kinds) for spread in SPREADS), key=error)
    tells_S = (unit_SD < BOUNDLESS).any(dim=1).tolist()
    for kind in dict.fromkeys(kind for kind, tells in zip(states.kinds, tells_S, strict=True) if tells):
        best_S = min((with_one(best_S, kind, spread) for spread in SPREADS), key=error)
    width_SD = unit_SD / torch.tensor(best_S).sqrt()[:, None]
    return Similarity(torch.where(unit_SD < BOUNDLESS, width_SD, BOUNDLESS), states.orders)


def _widths(features_nF: Floats, kinds: Sequence[int]) -> Tensor:
    """(S, D) of spread 1, after the standard deviation of each feature in all states of a kind; one that is alike in
    all rows tells none apart."""
    features_nSD = features_nF.reshape(len(features_nF), len(kinds), -1)
    of_kind = {kind: features_nSD[:, np.equal(kinds, kind)] for kind in kinds}
    scale_of = {kind: some.std(axis=(0, 1), dtype=np.float64) for kind, some in of_kind.items()}
    scale_SD = np.stack([scale_of[kind] for kind in kinds])
    differs_SD = scale_SD > SMALLEST_DEVIATION
    width_SD = scale_SD * np.sqrt(2 * differs_SD.sum(axis=1, keepdims=True))
    return torch.from_numpy(np.where(differs_SD, width_SD, BOUNDLESS)).float()


class _Errors(NamedTuple):
    """Mean squared ones."""

    held_out_P: Floats
    """At some of the penalties."""
    left_out: float
    """Of own rows, each answered by a fit on the others at the best of these penalties: its weight over its place on
    the diagonal of the inverse (Rasmussen and Williams 2006, equation 5.12)."""


class _Trial(NamedTuple):
    """Distances at spread 1, from which those at any other are had without the features: of A pairs of states, those
    that meet in any of O orders."""

    among_Ann: Tensor
    across_Amn: Tensor
    pair_OS: Tensor
    targets_nK: Tensor
    answers_mK: Tensor

    @classmethod
    def of(cls, seen: Rows, unseen: Rows, unit_SD: Tensor, orders: Sequence[Sequence[int]]) -> _Trial:
        center_SD = torch.from_numpy(seen.features_nF.mean(axis=0)).view_as(unit_SD)
        pairs = list(dict.fromkeys(pair for order in orders for pair in enumerate(order)))
        pair_OS = torch.tensor([[pairs.index(pair) for pair in enumerate(order)] for order in orders])

        def states(rows: Rows) -> Tensor:
            return torch.from_numpy(rows.features_nF).reshape(-1, *unit_SD.shape).transpose(0, 1)

        def apart(x_SnD: Tensor, z_SmD: Tensor) -> Tensor:
            """Both of a pair about one centre: offsets cost digits, and two centres would set like states apart."""

            def distance(one: int, other: int) -> Tensor:
                x_nD, z_mD = ((each - center_SD[one]) / unit_SD[one] for each in (x_SnD[one], z_SmD[other]))
                return torch.cdist(x_nD, z_mD)

            return torch.stack([distance(*pair) for pair in pairs])

        seen_SnD, mean_K = states(seen), seen.targets_nK.mean(axis=0)
        targets_nK, answers_mK = (torch.from_numpy(rows.targets_nK - mean_K).float() for rows in (seen, unseen))
        among_Ann = apart(seen_SnD, seen_SnD)
        for at, (one, other) in enumerate(pairs):
            if one == other:
                among_Ann[at].fill_diagonal_(0)
        return cls(among_Ann, apart(states(unseen), seen_SnD), pair_OS, targets_nK, answers_mK)

    def once(self) -> _Trial:
        """The first of own rows that are alike."""
        among_nn = self._similar(self.among_Ann, (1.0,) * self.pair_OS.shape[1])
        size_n = among_nn.diagonal().sqrt()
        alike_nn = among_nn > (1 - ALIKE) * size_n[:, None] * size_n
        first_n = ~alike_nn.tril(-1).any(dim=1)
        if first_n.all():
            return self
        among_Ann = self.among_Ann[:, first_n][:, :, first_n]
        across_Amn, targets_nK = self.across_Amn[:, :, first_n], self.targets_nK[first_n]
        return self._replace(among_Ann=among_Ann, across_Amn=across_Amn, targets_nK=targets_nK)

    def errors(self, spread_S: tuple[float, ...]) -> _Errors:
        """Infinite where rounding makes the system unsolvable."""
        among_nn, across_mn = (self._similar(apart_A, spread_S) for apart_A in (self.among_Ann, self.across_Amn))
        itself_n = among_nn.diagonal().clone()
        error_P, best_nn, best_nK = np.full(len(SOME_PENALTIES), np.inf, np.float32), None, self.targets_nK
        for at, penalty in enumerate(SOME_PENALTIES):
            among_nn.diagonal().copy_(itself_n + penalty)
            root_nn, failed = torch.linalg.cholesky_ex(among_nn)
            if failed:
                continue
            weight_nK = torch.cholesky_solve(self.targets_nK, root_nn)
            error_P[at] = float((across_mn @ weight_nK - self.answers_mK).square().mean())
            if error_P[at] <= error_P.min():
                best_nn, best_nK = root_nn, weight_nK
        if best_nn is None:
            return _Errors(error_P, np.inf)
        left_nK = best_nK / torch.cholesky_inverse(best_nn).diagonal()[:, None]
        return _Errors(error_P, float(left_nK.square().mean()))

    def _similar(self, apart_Amn: Tensor, spread_S: tuple[float, ...]) -> Tensor:
        """A few rows at a time: what is computed of them stays in a core's cache."""
        similar_mn = torch.zeros_like(apart_Amn[0])
        for apart_Abn, into_bn in zip(apart_Amn.split(FEW, dim=1), similar_mn.split(FEW), strict=True):
            for pair_S in self.pair_OS:
                alike_S = [matern(apart_Abn[pair] * spread**0.5) for pair, spread in zip(pair_S, spread_S, strict=True)]
                into_bn.add_(anova(alike_S))
        return similar_mn.div_(len(self.pair_OS))
