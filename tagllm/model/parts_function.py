"""Softmax attention over several sets of keys at once, and its gradient, as one autograd function.

Only queries and the live keys and values have a gradient; the frozen ones are constants. Nothing of size queries x keys
is saved for backward: scores are computed again, as flash attention does.

B rows, G key-value heads, M queries of all heads of a group (R heads x S positions), T keys of all sets, E head size,
n pieces of a set. All arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """The rows that have a piece, and how many keys it has: behind these it is padded."""

    piece: int
    rows: slice | list[int]
    length: int


class Groups(NamedTuple):
    """Which rows have which piece: `each` piece with its rows, for a product of its own.

    On CUDA each of so many small products would cost its launches. There `together` is the same for one batched
    product: the rows of every piece, padded to as many (n, R), and at which of these places each row is (B; -1: none).
    """

    each: list[Group]
    together: tuple[Tensor, Tensor] | None = None


class KeySet(NamedTuple):
    """Frozen keys and values (n, G, T of this set, E) that rows share, and which of the queries they are asked by."""

    keys: Tensor
    values: Tensor
    groups: Groups
    asked_by: int


class Live(NamedTuple):
    """Keys and values (B, G, S, E) of the live positions. Before them each row has frozen ones of its own: `below` is
    (B, G, T of a row + S, E), its last S places free for the live ones; fp32 is written to, else a copy is."""

    keys: Tensor
    values: Tensor
    keys_below: Tensor | None
    values_below: Tensor | None

    @property
    def stays(self) -> bool:
        """Whether the live ones stay below, so that nobody else needs to keep them."""
        return self.keys_below is not None and self.keys_below.dtype == torch.float32

    def joined(self) -> tuple[Tensor, Tensor]:
        return _behind(self.keys_below, self.keys), _behind(self.values_below, self.values)


def _behind(below: Tensor | None, live: Tensor) -> Tensor:
    if below is None:
        return live.float()
    joined = below.float()
    joined[:, :, joined.shape[2] - live.shape[2] :] = live
    return joined


def attend_parts(
    queries: Sequence[Tensor], sets: Sequence[KeySet], live: Live, bias_B11ST: Tensor, softcap: float | None
) -> Tensor:
    """softmax over the keys of all sets, then those of `live`, of (query keys + bias), times the values: (B, G, M, E).

    Args:
        queries: scaled, (B, G, M, E); the first one asks the live keys and those before them.
        bias_B11ST: 0 where a query sees a key, else very low.
    """
    result: Tensor = _AttendParts.apply(  # type: ignore[no-untyped-call]
        sets, bias_B11ST, softcap, live.keys_below, live.values_below, live.keys, live.values, *queries
    )
    return result


class _AttendParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sets: Sequence[KeySet], bias_B11ST: Tensor, softcap: float | None, keys_below: Tensor | None,
        values_below: Tensor | None, keys: Tensor, values: Tensor, *queries: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.sets, ctx.bias_B11ST, ctx.softcap, ctx.below = sets, bias_B11ST, softcap, (keys_below, values_below)
        live = Live(keys, values, *ctx.below)
        ctx.stays, ctx.num_live, ctx.dtype = live.stays, keys.shape[2], keys.dtype
        ctx.save_for_backward(*queries, *(() if live.stays else (keys, values)))
        keys_BGTE, values_BGTE = live.joined()
        weights_BGMT, _ = _weights(queries, sets, keys_BGTE, bias_B11ST, softcap)
        *shared, own = weights_BGMT.split(_sizes(sets, keys_BGTE), dim=3)
        out: Tensor = own @ values_BGTE
        for weights, one in zip(shared, sets, strict=True):
            _add_over(out, weights, one.values, one.groups)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, sets, saved = grads[0].contiguous(), ctx.sets, ctx.saved_tensors
        queries = saved if ctx.stays else saved[:-2]
        keys_BGTE, values_BGTE = ctx.below if ctx.stays else Live(*saved[-2:], *ctx.below).joined()
        weights_BGMT, capped = _weights(queries, sets, keys_BGTE, ctx.bias_B11ST, ctx.softcap)
        weight_grad = _onto([grad] * len(queries), sets, [one.values for one in sets], values_BGTE)
        score_grad: Tensor = torch._softmax_backward_data(weight_grad, weights_BGMT, 3, torch.float32)
        if capped is not None:
            score_grad = score_grad * (1 - capped.square())
        *shared, own = score_grad.split(_sizes(sets, keys_BGTE), dim=3)
        query_grads = [own @ keys_BGTE, *(torch.zeros_like(query, dtype=torch.float32) for query in queries[1:])]
        for part, one in zip(shared, sets, strict=True):
            _add_over(query_grads[one.asked_by], part, one.keys, one.groups)
        here = slice(weights_BGMT.shape[3] - ctx.num_live, None)
        key_grad = score_grad[..., here].transpose(2, 3) @ queries[0].float()
        value_grad = weights_BGMT[..., here].transpose(2, 3) @ grad
        query_grads = [query_grad.to(query.dtype) for query_grad, query in zip(query_grads, queries, strict=True)]
        return (None,) * 5 + (key_grad.to(ctx.dtype), value_grad.to(ctx.dtype), *query_grads)


def _sizes(sets: Sequence[KeySet], keys_BGTE: Tensor) -> list[int]:
    return [*(one.keys.shape[2] for one in sets), keys_BGTE.shape[2]]


def _weights(
    queries: Sequence[Tensor], sets: Sequence[KeySet], keys_BGTE: Tensor, bias_B11ST: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """(B, G, M, T), and with a softcap the scores over it."""
    scores = _onto([query.float() for query in queries], sets, [one.keys for one in sets], keys_BGTE)
    capped = None
    if softcap is not None:
        capped = scores.div_(softcap).tanh_()
        scores = capped * softcap
    B, _, _, S, T = bias_B11ST.shape
    scores.view(B, scores.shape[1], -1, S, T).add_(bias_B11ST)
    return scores.softmax(dim=3), capped


def _onto(x: Sequence[Tensor], sets: Sequence[KeySet], theirs: Sequence[Tensor], own_BGTE: Tensor) -> Tensor:
    """Dot products with the keys (or values) of each set, then with the rows' own: (B, G, M, T), zero at pads.

    Args:
        x: what asks, of each kind (B, G, M, E); the first one asks the rows' own.
    """
    own_BGMT = x[0] @ own_BGTE.transpose(2, 3)
    if not sets:
        return own_BGMT
    sizes = _sizes(sets, own_BGTE)
    out_BGMT = x[0].new_zeros(*x[0].shape[:3], sum(sizes))
    *places, own = out_BGMT.split(sizes, dim=3)
    own.copy_(own_BGMT)
    for one, matrix_nGTE, place in zip(sets, theirs, places, strict=True):
        matrix_nGET, asking = matrix_nGTE.float().transpose(2, 3), x[one.asked_by]
        if one.groups.together is not None:
            place.copy_(_together(asking, matrix_nGET, *one.groups.together))
            continue
        for piece, rows, length in one.groups.each:
            product = _grouped(asking[rows]) @ matrix_nGET[piece, :, :, :length]
            place[rows, :, :, :length] = _ungrouped(product, asking.shape[2])
    return out_BGMT


def _add_over(out_BGME: Tensor, weights_BGMT: Tensor, matrix_nGTE: Tensor, groups: Groups) -> None:
    """Adds to each row the sum, weighted, over the keys (or values) of its piece."""
    matrix_nGTE = matrix_nGTE.float()
    if groups.together is not None:
        out_BGME += _together(weights_BGMT, matrix_nGTE, *groups.together)
        return
    for piece, rows, length in groups.each:
        product = _grouped(weights_BGMT[rows, :, :, :length]) @ matrix_nGTE[piece, :, :length]
        out_BGME[rows] += _ungrouped(product, out_BGME.shape[2])


def _grouped(x_bGMa: Tensor) -> Tensor:
    """(b, G, M, a) -> (G, b M, a): rows with the same piece go through one product."""
    return x_bGMa.transpose(0, 1).flatten(1, 2)


def _ungrouped(product_GNa: Tensor, M: int) -> Tensor:
    G, _, a = product_GNa.shape
    return product_GNa.view(G, -1, M, a).transpose(0, 1)


def _together(x_BGMa: Tensor, matrix_nGab: Tensor, rows_nR: Tensor, place_B: Tensor) -> Tensor:
    """Each row times the matrix of its piece, zero without one, all in one product: (B, G, M, b)."""
    _, G, M, a = x_BGMa.shape
    n, R = rows_nR.shape
    x = x_BGMa[rows_nR.flatten()].view(n, R, G, M, a).transpose(1, 2)
    product = (x.reshape(n, G, R * M, a) @ matrix_nGab).view(n, G, R, M, -1).transpose(1, 2)
    found = product.reshape(n * R, G, M, -1)[place_B.clamp(min=0)]
    return found.masked_fill_((place_B < 0)[:, None, None, None], 0.0)
