"""Kernel ridge regression: on every training row, a dense system of up to 20,000 unknowns for many penalties, or as
seen from some of them, the landmarks.

n rows, F features, K targets, P penalties, R directions of the preconditioner, m rows held out, M landmarks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tagllm.arrays import Doubles, Floats
from tagllm.evaluate.choosing import Rows
from tagllm.evaluate.ridge import RidgeFit
from tagllm.kernel import ROWS_AT_ONCE, Kernel, Landmarks, similarity_parts

PENALTIES = np.logspace(0.5, -3.5, 9)
"""Added to the similarity 1 of a row to itself; from the strongest to the weakest."""
RANK = 2048
TOLERANCE, MOST_STEPS = 1e-3, 200
"""Of the residual beside the targets; and where a system is not solved by then, its last answer is taken."""
JITTER = 1e-6
"""Added to the similarity of each row to itself, times their number: rows may be alike, and similarities are fp32. Only
the preconditioner has it."""
LANDMARK_JITTER = 1e-7
"""The same for landmarks, in fp64, so that landmarks alike do no harm."""


class Similarity(NamedTuple):
    """A kernel before it is fitted: how alike rows are at these widths, the mean over `orders` in which the states of
    a row are taken for the same (none: as they are)."""

    width_SD: Tensor
    orders: tuple[tuple[int, ...], ...] = ()

    def __call__(self, features_nF: Tensor, at_MF: Tensor) -> Tensor:
        """(n, M); 20,000 squared are 1.6 GB, and never more of them than one."""
        similar_nM = features_nF.new_zeros(len(features_nF), len(at_MF))
        ordered, width_SD = self._ordered(at_MF), self.width_SD.to(features_nF.dtype)
        for landmarks in ordered:
            parts = similarity_parts(features_nF, landmarks, width_SD)
            for into_bM, similar_bM in zip(similar_nM.split(ROWS_AT_ONCE), parts, strict=True):
                into_bM.add_(similar_bM)
        return similar_nM.div_(len(ordered))

    def kernel(self, at_MF: Tensor, weight_KM: Tensor) -> Kernel:
        """Of rows with these weights: rows in another order are other rows there."""
        ordered = self._ordered(at_MF)
        at_SM = torch.cat([landmarks.at_SM for landmarks in ordered], dim=1)
        weight_KM = weight_KM.repeat(1, len(ordered)) / len(ordered)
        return Kernel(ordered[0].state_TD, at_SM, self.width_SD, weight_KM.contiguous())

    def _ordered(self, at_MF: Tensor) -> list[Landmarks]:
        landmarks = Landmarks.of(at_MF, len(self.width_SD))
        return [landmarks.in_order(order) for order in self.orders] or [landmarks]


class KernelSystem:
    """(similarities + penalty) weights = targets, by conjugate gradients. The preconditioner is a Nystroem
    approximation of the similarities (Frangella, Tropp and Udell 2021), which is exact up to RANK rows: one or two
    steps then. A Cholesky factorisation would take n^3 / 3 products for each penalty, a minute for 20,000 rows.
    """

    def __init__(self, similar_nn: Tensor) -> None:
        self.similar_nn = similar_nn
        n = len(similar_nn)
        at = torch.from_numpy(np.sort(np.random.default_rng(0).choice(n, min(RANK, n), replace=False)))
        some_Rn = similar_nn[at].double()
        root_RR = torch.linalg.cholesky(some_Rn[:, at] + JITTER * len(at) * torch.eye(len(at)))
        half_Rn = torch.linalg.solve_triangular(root_RR, some_Rn, upper=False)
        size_R, turn_RR = torch.linalg.eigh(half_Rn @ half_Rn.T)
        kept = size_R > JITTER * size_R[-1]
        self.size_R = size_R[kept].float()
        self.direction_Rn = ((turn_RR[:, kept] / size_R[kept].sqrt()).T @ half_Rn).float()

    def solve(self, targets_nK: Tensor, penalty: float, start_nK: Tensor) -> Tensor:
        """Weights (n, K), from those of another penalty on."""
        weight_nK = start_nK.clone()
        rest_nK = targets_nK - self._times(weight_nK, penalty)
        enough_K = TOLERANCE * targets_nK.norm(dim=0)
        way_nK, slope_K = torch.zeros_like(rest_nK), torch.ones_like(enough_K)
        for _ in range(MOST_STEPS):
            if (rest_nK.norm(dim=0) <= enough_K).all():
                break
            better_nK = self._almost_inverse(rest_nK, penalty)
            slope_K, before_K = (rest_nK * better_nK).sum(dim=0), slope_K
            way_nK = better_nK + slope_K / before_K.clamp(min=1e-30) * way_nK
            ahead_nK = self._times(way_nK, penalty)
            length_K = slope_K / (way_nK * ahead_nK).sum(dim=0).clamp(min=1e-30)
            weight_nK += length_K * way_nK
            rest_nK -= length_K * ahead_nK
        return weight_nK

    def _times(self, weight_nK: Tensor, penalty: float) -> Tensor:
        return self.similar_nn @ weight_nK + penalty * weight_nK

    def _almost_inverse(self, rest_nK: Tensor, penalty: float) -> Tensor:
        """The inverse along the directions that are known; all others count like the smallest of these."""
        along_RK = self.direction_Rn @ rest_nK
        more_R = (self.size_R[0] + penalty) / (self.size_R + penalty) - 1
        found_nK: Tensor = rest_nK + self.direction_Rn.T @ (more_R[:, None] * along_RK)
        return found_nK


class KernelFits(NamedTuple):
    """One kernel at every penalty."""

    similar: Similarity
    at_nF: Tensor
    weight_PnK: Tensor
    mean_K: Tensor
    system: KernelSystem

    @classmethod
    def of(cls, rows: Rows, similar: Similarity) -> KernelFits:
        at_nF, targets_nK = (torch.from_numpy(column).float() for column in rows)
        mean_K = targets_nK.mean(dim=0)
        system = KernelSystem(similar(at_nF, at_nF))
        weights = [torch.zeros_like(targets_nK)]
        for penalty in PENALTIES:
            weights.append(system.solve(targets_nK - mean_K, float(penalty), weights[-1]))
        return cls(similar, at_nF, torch.stack(weights[1:]), mean_K, system)

    def errors(self, held_out: Rows) -> Doubles:
        features_mF, targets_mK = (torch.from_numpy(column).float() for column in held_out)
        values_PmK = self.similar(features_mF, self.at_nF) @ self.weight_PnK + self.mean_K
        error_P: Doubles = (values_PmK - targets_mK).square().mean(dim=(1, 2)).double().numpy()
        return error_P

    def fit(self, at: int, targets_nK: Floats, error: float) -> KernelFit:
        """With the penalty of this number, which had this error; of the targets it was made of."""
        return KernelFit(self, at, torch.from_numpy(targets_nK), self.weight_PnK[at], self.mean_K, error)


class KernelFit(NamedTuple):
    """A kernel at one penalty, on every row."""

    fits: KernelFits
    at: int
    """The number of its penalty."""
    targets_nK: Tensor
    weight_nK: Tensor
    bias_K: Tensor
    error: float
    """Mean squared error by which the penalty was chosen."""

    def again(self, targets_nK: Floats) -> KernelFit:
        """Of other targets of the same rows."""
        other_nK = torch.from_numpy(targets_nK)
        mean_K = other_nK.mean(dim=0)
        weight_nK = self.fits.system.solve(other_nK - mean_K, float(PENALTIES[self.at]), self.weight_nK)
        return self._replace(targets_nK=other_nK, weight_nK=weight_nK, bias_K=mean_K)

    def own_values(self) -> Floats:
        """What it answers to the rows it was fitted on (n, K): the weights times the penalty are what it leaves."""
        values_nK: Floats = (self.targets_nK - float(PENALTIES[self.at]) * self.weight_nK).numpy()
        return values_nK

    def kernel(self) -> Kernel:
        """Its answers but for the bias."""
        return self.fits.similar.kernel(self.fits.at_nF, self.weight_nK.T)


class Nystroem(NamedTuple):
    """The Nystroem features of a kernel: (x, y) -> features whose products are the similarities, as seen from M rows
    (Williams and Seeger 2001)."""

    similar: Similarity
    at_MF: Tensor
    root_MM: Tensor
    """Cholesky factor of the similarities among landmarks, fp64."""

    @classmethod
    def of(cls, features_nF: Floats, number: int, similar: Similarity) -> Nystroem:
        """So many of these rows, drawn evenly."""
        chosen = np.random.default_rng(0).choice(len(features_nF), number, replace=False)
        at_MF = torch.from_numpy(features_nF[np.sort(chosen)])
        exact_MF = at_MF.double()
        among_MM = similar(exact_MF, exact_MF)
        root_MM = torch.linalg.cholesky(among_MM + LANDMARK_JITTER * len(at_MF) * torch.eye(len(at_MF)))
        return cls(similar, at_MF, root_MM)

    def rows(self, rows: Rows) -> Rows:
        seen_Mn = self.similar(torch.from_numpy(rows.features_nF), self.at_MF).T.double()
        features_Mn = torch.linalg.solve_triangular(self.root_MM, seen_Mn, upper=False)
        return Rows(features_Mn.T.numpy(), rows.targets_nK)

    def kernel(self, weight_KF: Floats) -> Kernel:
        """Of weights of the features."""
        weight_MK = torch.from_numpy(weight_KF.T).double()
        weight_MK = torch.linalg.solve_triangular(self.root_MM.T, weight_MK, upper=True)
        return self.similar.kernel(self.at_MF, weight_MK.T.float())


class LandmarkFit(NamedTuple):
    """A kernel as seen from landmarks, at one penalty."""

    landmarks: Nystroem
    ridge: RidgeFit

    @property
    def error(self) -> float:
        return self.ridge.error

    @property
    def bias_K(self) -> Tensor:
        return torch.from_numpy(self.ridge.bias_K)

    def again(self, targets_nK: Floats) -> LandmarkFit:
        """Of other targets of the same rows."""
        return self._replace(ridge=self.ridge.again(targets_nK))

    def own_values(self) -> Floats:
        """What it answers to the rows it was fitted on (n, K)."""
        return self.ridge.own_values()

    def kernel(self) -> Kernel:
        """Its answers but for the bias."""
        return self.landmarks.kernel(self.ridge.weight_KF)
