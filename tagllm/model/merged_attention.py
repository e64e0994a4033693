"""Attention over several sets of keys without a gradient, on a CPU: each set by itself, then put together.

Each set gives its output and the logarithm of the sum of its exponentials; these weigh the outputs against each other.
So long sets of keys are not copied, and rows that share one go through it as one long query. Short ones that all rows
share are put before each row's own.

B rows, G key-value heads, R query heads of each, S positions, T keys, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EXPLICIT_UP_TO = 512
"""Keys up to which three plain operations beat torch's flash kernel (on fewer than 100 keys more than fivefold)."""
SCORES_AT_ONCE = 2**19
"""2 MiB of fp32, which stay in the caches and are not allocated anew: with scores of all rows at once 256 to 512 keys
took two and a half to four times as long."""
QUERIES_AT_ONCE = 64
"""Of a causal set with more scores than that: what keys behind them would say is not computed."""


class Shared(NamedTuple):
    """Keys and values (G, T, E) that all positions of some rows see, and these rows' queries (rows, G R, S, E)."""

    rows: slice | list[int]
    query: Tensor
    keys: Tensor
    values: Tensor


def attend_merged(query: Tensor, keys: Tensor, values: Tensor, shared: Sequence[Shared], scale: float) -> Tensor:
    """Each row sees its own keys causally and all of those it shares: (B, G R, S, E), fp32.

    Args:
        query: (B, G R, S, E).
        keys, values: (B, G, S, E), every row's own.
    """
    B, H, S, E = query.shape
    G = keys.shape[1]
    # few keys that all rows share are copied before each row's own: that takes less than weighing outputs
    few = [one for one in shared if one.rows == slice(0, B) and one.keys.shape[1] <= S <= EXPLICIT_UP_TO // 2]
    shared = [one for one in shared if all(one is not other for other in few)]
    keys = torch.cat([*(one.keys.expand(B, -1, -1, -1) for one in few), keys], dim=2)
    values = torch.cat([*(one.values.expand(B, -1, -1, -1) for one in few), values], dim=2)
    by_group = query.float().mul(scale).reshape(B * G, H // G, S, E)
    keys, values = (t.float().reshape(B * G, 1, -1, E) for t in (keys, values))
    out, log = _attend(by_group, keys, values, causal=True, log_too=bool(shared))
    out, log = out.reshape(B, H, S, E), log.reshape(B, H, S, 1) if shared else log
    for rows, asked, some_keys, some_values in shared:
        grouped = asked.float().mul(scale).view(-1, G, H // G, S, E).transpose(0, 1)  # (G, rows, R, S, E)
        found = _attend(grouped.reshape(1, G, -1, E), some_keys[None].float(), some_values[None].float())
        seen, seen_log = (t.view(*grouped.shape[:4], -1).transpose(0, 1).reshape(-1, H, S, t.shape[-1]) for t in found)
        total = torch.logaddexp(log[rows], seen_log)
        out[rows] = out[rows] * (log[rows] - total).exp() + seen * (seen_log - total).exp()
        log[rows] = total
    return out


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool = False, log_too: bool = True
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (b, h, M, 1) of scaled queries (b, h, M, E) over keys (b, h or 1, T, E), all fp32. If
    causal the last query sees all keys, the one before all but one, and so on."""
    b, h, M, E = query.shape
    T = keys.shape[2]
    if T > EXPLICIT_UP_TO:
        there = (t.expand(b, h, T, E) for t in (keys, values))
        out, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, *there, 0.0, causal, scale=1.0)
        return out, log[..., None]
    if b * h * M * T <= SCORES_AT_ONCE:
        return _attend_explicitly(query, keys, values, causal, log_too)
    out, log = torch.empty_like(query), query.new_empty(b, h, M, 1)
    step = QUERIES_AT_ONCE if causal else max(1, SCORES_AT_ONCE // (h * T))
    for first in range(0, M, step):
        end = min(M, first + step)
        seen = T - M + end if causal else T
        num_rows = max(1, SCORES_AT_ONCE // (h * (end - first) * seen))
        for row in range(0, b, num_rows):
            rows = slice(row, row + num_rows)
            out[rows, :, first:end], log[rows, :, first:end] = _attend_explicitly(
                query[rows, :, first:end], keys[rows, :, :seen], values[rows, :, :seen], causal, log_too
            )
    return out, log


def _attend_explicitly(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, log_too: bool
) -> tuple[Tensor, Tensor]:
    """As `_attend`, with all scores at once."""
    b, h, M, E = query.shape
    T = keys.shape[2]
    if keys.shape[1] == 1:  # all heads of a group in one product
        query, keys, values = query.reshape(b, h * M, E), keys[:, 0], values[:, 0]
    scores = (query @ keys.transpose(-1, -2)).view(b, h, M, T)
    if causal:
        scores += torch.full((M, T), -torch.inf).triu_(1 + T - M)
    weights = scores.softmax(dim=3)
    out = (weights.view(*query.shape[:-1], T) @ values).view(b, h, M, E)
    # from the largest weight: one fused softmax and two maxima are faster than an exponential of one's own
    log = scores.amax(dim=3, keepdim=True) - weights.amax(dim=3, keepdim=True).log() if log_too else weights[..., :1]
    return out, log
