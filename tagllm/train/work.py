"""How much of a step's positions was computed, and how that compares with the plain full backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tagllm.data.batch import Batch


class Work(NamedTuple):
    """Positions of a step: `live` ones, `frozen` ones of all rows, `distinct` ones after sharing within micro-batches,
    and `computed` ones (the rest was remembered)."""

    live: float
    frozen: float
    distinct: float
    computed: float

    @property
    def flops_ratio(self) -> float:
        """FLOPs over those of the plain full backward: 2 N per frozen position computed and 4 N per live one, against
        4 N for each (N weights of the decoder, which has no weight gradients; attention scores left out)."""
        return (2 * self.computed + 4 * self.live) / max(4 * (self.frozen + self.live), 1)

    def scalars(self, seconds: float) -> dict[str, float]:
        return {
            "speed/tokens_per_second": (self.live + self.frozen) / seconds,
            "speed/live_tokens_per_second": self.live / seconds,
            "speed/frozen_tokens_per_second": self.frozen / seconds,
            "speed/flops_ratio": self.flops_ratio,
            "speed/prefix_sharing_ratio": 1 - self.distinct / max(self.frozen, 1),
        }


def work_of(batches: Sequence[Batch], computed: int) -> Work:
    return Work(
        live=sum(sum(batch.live.lengths) for batch in batches),
        frozen=sum(sum(batch.prefix_lengths) for batch in batches),
        distinct=sum(sum(batch.pieces.tokens.lengths) + sum(batch.own.lengths) for batch in batches),
        computed=computed,
    )
