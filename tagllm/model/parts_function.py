"""Softmax attention over several sets of keys at once, and its gradient, as one autograd function.

Only queries and the keys and values of the last set have a gradient; the others are constants. Nothing of size
queries x keys is saved for backward: scores are computed again, as flash attention does.

B rows, G key-value heads, M queries of all heads of a group (R heads x S positions), T keys of all sets, E head size,
n pieces of a set. All arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Groups = list[tuple[int, slice | list[int]]] | None
"""Which rows have which piece; None: row b has piece b."""


class KeySet(NamedTuple):
    """Keys and values (n, G, T of this set, E)."""

    keys: Tensor
    values: Tensor
    groups: Groups = None

    @property
    def num_keys(self) -> int:
        return self.keys.shape[2]


def attend_parts(
    queries: list[Tensor], sets: list[KeySet], bias_B11ST: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """softmax over the keys of all sets of (scale * query_i keys_i + bias), times the values: (B, G, M, E), fp32.

    Args:
        queries: (B, G, M, E), one per set (each may be turned otherwise).
        sets: the last one is differentiated.
        bias_B11ST: 0 where a query sees a key, else very low.
    """
    keys, values, _ = sets[-1]
    result: Tensor = _AttendParts.apply(  # type: ignore[no-untyped-call]
        sets[:-1], bias_B11ST, scale, softcap, keys, values, *queries
    )
    return result


class _AttendParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, frozen: list[KeySet], bias_B11ST: Tensor, scale: float, softcap: float | None,
        keys: Tensor, values: Tensor, *queries: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.frozen, ctx.bias_B11ST, ctx.scale, ctx.softcap = frozen, bias_B11ST, scale, softcap
        ctx.save_for_backward(keys, values, *queries)
        sets = [*frozen, KeySet(keys, values)]
        weights_BGMT, _ = _weights(queries, sets, bias_B11ST, scale, softcap)
        parts = weights_BGMT.split([one.num_keys for one in sets], dim=3)
        return torch.stack([_times(w, one.values, one.groups) for w, one in zip(parts, sets, strict=True)]).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        keys, values, *queries = ctx.saved_tensors
        sets = [*ctx.frozen, KeySet(keys, values)]
        sizes = [one.num_keys for one in sets]
        weights_BGMT, capped = _weights(queries, sets, ctx.bias_B11ST, ctx.scale, ctx.softcap)
        weight_grad = torch.cat([_times(grads[0], one.values.transpose(2, 3), one.groups) for one in sets], dim=3)
        score_grad: Tensor = torch._softmax_backward_data(weight_grad, weights_BGMT, 3, torch.float32)
        if capped is not None:
            score_grad = score_grad * (1 - capped.square())
        parts = (score_grad * ctx.scale).split(sizes, dim=3)
        query_grads = [
            _times(part, one.keys, one.groups).to(query.dtype)
            for part, one, query in zip(parts, sets, queries, strict=True)
        ]
        key_grad = parts[-1].transpose(2, 3) @ queries[-1].float()
        value_grad = weights_BGMT.split(sizes, dim=3)[-1].transpose(2, 3) @ grads[0]
        return (None, None, None, None, key_grad.to(keys.dtype), value_grad.to(values.dtype), *query_grads)


def _weights(
    queries: tuple[Tensor, ...] | list[Tensor], sets: list[KeySet], bias_B11ST: Tensor, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(B, G, M, T), and with a softcap the scores over it."""
    scores = torch.cat(
        [_times(q.float() * scale, one.keys.transpose(2, 3), one.groups) for q, one in zip(queries, sets, strict=True)],
        dim=3,
    )
    capped = None
    if softcap is not None:
        capped = scores.div_(softcap).tanh_()
        scores = capped * softcap
    B, _, _, S, T = bias_B11ST.shape
    scores.view(B, scores.shape[1], -1, S, T).add_(bias_B11ST)
    return scores.softmax(dim=3), capped


def _times(x_BGMa: Tensor, matrix_nGab: Tensor, groups: Groups) -> Tensor:
    """Each row times the matrix of its piece: (B, G, M, b). Rows with the same piece go through one product."""
    matrix_nGab = matrix_nGab.float()
    if groups is None:
        return x_BGMa @ matrix_nGab
    B, G, M, a = x_BGMa.shape
    out = x_BGMa.new_zeros(B, G, M, matrix_nGab.shape[3])
    for piece, rows in groups:
        x = x_BGMa[rows].transpose(0, 1)  # (G, rows, M, a)
        out[rows] = (x.reshape(G, -1, a) @ matrix_nGab[piece]).view(G, -1, M, out.shape[3]).transpose(0, 1)
    return out
