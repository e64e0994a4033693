"""Softmax attention over several sets of keys at once, and its gradient, as one autograd function.

Only queries and the keys and values of the last set have a gradient; the others are constants. Nothing of size
queries x keys is saved for backward: scores are computed again from the log of their sums (as flash attention does).

B rows, G key-value heads, M queries of all heads of a group (R heads x S positions), T keys of a set, E head size,
n pieces of a set. All arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Groups = list[tuple[int, slice | list[int]]] | None
"""Which rows have which piece; None: row b has piece b."""


class KeySet(NamedTuple):
    """Keys and values (n, G, T, E), and which query sees which key."""

    keys: Tensor
    values: Tensor
    groups: Groups
    seen_BST: Tensor


def attend_parts(queries: list[Tensor], sets: list[KeySet], scale: float, softcap: float | None) -> Tensor:
    """softmax over all sets of (scale * query_i keys_i), times the values: (B, G, M, E), fp32.

    Args:
        queries: (B, G, M, E), one per set (each may be turned otherwise).
        sets: the last one is differentiated.
    """
    last = sets[-1]
    result: Tensor = _AttendParts.apply(  # type: ignore[no-untyped-call]
        sets[:-1], last.seen_BST, scale, softcap, last.keys, last.values, *queries
    )
    return result


class _AttendParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, frozen: list[KeySet], seen_BST: Tensor, scale: float, softcap: float | None,
        keys: Tensor, values: Tensor, *queries: Tensor,
    ) -> Tensor:  # fmt: skip
        sets = [*frozen, KeySet(keys, values, None, seen_BST)]
        scores = [_scores(q, one, scale, softcap) for q, one in zip(queries, sets, strict=True)]
        highest_BGM1 = torch.stack([s.amax(dim=3, keepdim=True) for s in scores]).amax(dim=0)
        weights = [s.sub_(highest_BGM1).exp_() for s in scores]
        sum_BGM1 = torch.stack([w.sum(dim=3, keepdim=True) for w in weights]).sum(dim=0)
        out = sum(_times(w, one.values, one.groups) for w, one in zip(weights, sets, strict=True)) / sum_BGM1
        ctx.frozen, ctx.seen_BST, ctx.scale, ctx.softcap = frozen, seen_BST, scale, softcap
        ctx.save_for_backward(keys, values, out, highest_BGM1 + sum_BGM1.log(), *queries)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        keys, values, out, log_sum_BGM1, *queries = ctx.saved_tensors
        sets = [*ctx.frozen, KeySet(keys, values, None, ctx.seen_BST)]
        delta_BGM1 = (grads[0] * out).sum(dim=3, keepdim=True)
        query_grads = []
        for query, one in zip(queries, sets, strict=True):
            scores = _scores(query, one, ctx.scale, ctx.softcap)
            weights = (scores - log_sum_BGM1).exp_()
            score_grads = _times(grads[0], one.values.transpose(2, 3), one.groups).sub_(delta_BGM1).mul_(weights)
            if ctx.softcap is not None:  # masked scores are far outside of the cap, and their weights are zero
                score_grads *= 1 - (scores / ctx.softcap).clamp_(-1, 1).square_()
            score_grads *= ctx.scale
            query_grads.append(_times(score_grads, one.keys, one.groups).to(query.dtype))
        key_grad = (score_grads.transpose(2, 3) @ queries[-1].float()).to(keys.dtype)
        value_grad = (weights.transpose(2, 3) @ grads[0]).to(values.dtype)
        return (None, None, None, None, key_grad, value_grad, *query_grads)


def _scores(query_BGME: Tensor, one: KeySet, scale: float, softcap: float | None) -> Tensor:
    """(B, G, M, T), very low where a query does not see a key or a row has no piece."""
    scores = _times(query_BGME.float(), one.keys.transpose(2, 3), one.groups).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    B, S, T = one.seen_BST.shape
    hidden = ~one.seen_BST[:, None, None]
    scores.view(B, scores.shape[1], -1, S, T).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return scores


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
