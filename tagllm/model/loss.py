"""Loss terms as (sum, count). Means of means would weigh rows by how they were split; sums over global counts do not.

B rows, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tagllm.data.batch import Counts


class Sums(NamedTuple):
    """Summed losses of a batch: nats over labelled tokens, squared error or nats over head targets."""

    span: Tensor
    output: Tensor
    value: Tensor


class LossWeights(NamedTuple):
    span: float
    output: float
    value: float

    def of(self, sums: Sequence[float], counts: Sequence[int]) -> float:
        """The weighted loss, each term over its count, those that have one."""
        return sum(w * s / c for w, s, c in zip(self, sums, counts, strict=True) if c)


def nats_per_token(sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Of spans and of outputs, as far as there are such tokens: `span_nats`, `output_nats`."""
    return {f"{term}_nats": s / c for term, s, c in zip(("span", "output"), sums, counts, strict=False) if c}


def value_losses(values_BK: Tensor, target_BK: Tensor, num_classes: int) -> Tensor:
    """Squared errors (B, K), or cross entropy (B, 1) where `num_classes` > 0. NaN targets give 0."""
    known_BK = ~target_BK.isnan()
    target_BK = torch.where(known_BK, target_BK, 0.0)
    if num_classes:
        nats_B = functional.cross_entropy(values_BK, target_BK[:, 0].long(), reduction="none")
        return torch.where(known_BK[:, :1], nats_B[:, None], 0.0)
    return torch.where(known_BK, (values_BK - target_BK) ** 2, 0.0)


def total(sums: Sums, counts: Counts, weights: LossWeights) -> Tensor:
    """The loss of a step: each term's sum over its global count, weighted.

    A term without any label is a zero in the graph: parameters only it reaches get a zero gradient at every ZeRO stage
    (with none, AdamW would skip them at stage 0 and let their momentum run on at the others).
    """
    return torch.stack([w * term / max(count, 1) for term, count, w in zip(sums, counts, weights, strict=True)]).sum()
