"""What answers with numbers or classes: a linear map on hidden states and, where a closed-form fit found that better, a
Gaussian kernel.

K outputs, F features a head reads (D, the hidden size, for each state and mean it sees), M landmarks, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tagllm.config import HeadConfig, Reads

T = TypeVar("T")


def states_read(reads: Reads, last: T, mean: T) -> tuple[T, ...]:
    """What a head with `reads` sees side by side, of the state at its position and the mean over the fields."""
    return {"last": (last,), "mean": (mean,), "both": (last, mean)}[reads]


def similarity(features_BF: Tensor, landmarks_MF: Tensor, width_F: Tensor) -> Tensor:
    """exp(-|(x - landmark) / width|^2), (B, M)."""
    center_F = landmarks_MF.mean(dim=0)  # states have an offset far larger than what tells them apart
    x_BF, z_MF = (features_BF - center_F) / width_F, (landmarks_MF - center_F) / width_F
    squared_BM = x_BF.square().sum(dim=1)[:, None] + z_MF.square().sum(dim=1) - 2 * x_BF @ z_MF.T
    return torch.exp(-squared_BM.clamp(min=0))


class Kernel(NamedTuple):
    """A Gaussian kernel on landmarks (rows of the training data), one width for each feature."""

    landmarks_MF: Tensor
    width_F: Tensor
    weight_KM: Tensor

    def __call__(self, features_BF: Tensor) -> Tensor:
        """(B, K)."""
        return similarity(features_BF, self.landmarks_MF, self.width_F) @ self.weight_KM.T


@dataclass(frozen=True)
class Head:
    """A map from hidden states to standardised targets, linear plus that of a kernel if there is one; `mean` and `std`
    undo the standardisation."""

    spec: HeadConfig
    weight_KF: Tensor
    bias_K: Tensor
    mean_K: Tensor
    std_K: Tensor
    kernel: Kernel | None = None
    num_pools: int = 1
    """So many means over fields are read side by side."""

    @classmethod
    def new(cls, spec: HeadConfig, hidden_size: int, num_pools: int = 1) -> Head:
        features, outputs = num_features(spec, hidden_size, num_pools), spec.outputs
        zeros = torch.zeros(outputs)
        return cls(spec, torch.zeros(outputs, features), zeros, zeros.clone(), torch.ones(outputs), num_pools=num_pools)

    def blank(self) -> Head:
        """The same before it learned anything but the mean and spread of its targets."""
        return replace(
            self, weight_KF=torch.zeros_like(self.weight_KF), bias_K=torch.zeros_like(self.bias_K), kernel=None
        )

    def answer(self, features_BF: Tensor) -> Tensor:
        """(B, K) in units of the data, of a regression."""
        values_BK = features_BF @ self.weight_KF.T + self.bias_K
        if self.kernel is not None:
            values_BK = values_BK + self.kernel(features_BF)
        return values_BK * self.std_K + self.mean_K

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in a library."""
        found = {"weight": self.weight_KF, "bias": self.bias_K, "mean": self.mean_K, "std": self.std_K}
        if self.kernel is not None:
            kernel = self.kernel
            found |= {"landmarks": kernel.landmarks_MF, "width": kernel.width_F, "kernel_weight": kernel.weight_KM}
        return found


def num_features(spec: HeadConfig, hidden_size: int, num_pools: int) -> int:
    return hidden_size * sum(states_read(spec.reads, 1, num_pools))
