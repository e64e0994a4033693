"""The frozen prefix: forward once without a graph, keep keys and values, run the live part on top.

Everything before the first learned row is a constant of the data (attention is causal), so the gradient is the same
as that of the plain full backward. Where the backbone is replicated, prefixes seen before are remembered.

B rows, P prefix positions (left-padded), D hidden size; keys and values are (B, kv heads, P, head size) per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Prefix(NamedTuple):
    """What the live part and the probes need of a prefix. `pooled_BD` is a sum over the field positions."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    last_BD: Tensor
    pooled_BD: Tensor


class _Remembered(NamedTuple):
    """One row without padding: keys and values (layers, 2, kv heads, P, head size), last and pooled (2, D)."""

    kv: Tensor
    hidden: Tensor

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes + self.hidden.nbytes


Key = tuple[int, int]
"""A row and the length of its prefix (a probe may cut elsewhere than training does)."""
Compute = Callable[[Tensor, Tensor, Tensor], Prefix]


def positions_of(mask_BS: Tensor) -> Tensor:
    """Position ids under padding on either side: the number of real positions before (0 at pads)."""
    return (mask_BS.cumsum(dim=1) - 1).clamp(min=0)


class PrefixMemory:
    """Whole prefixes in host memory under a byte budget, by row.

    What has been admitted stays: epochs visit every row equally often, so an LRU would drop each row right before its
    next use, while a memory that is full for good keeps hitting in proportion to its size.
    Only for replicated backbones: under ZeRO-3 a rank that skips the prefix pass while another runs it would hang both.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = self.hits = self.lookups = 0
        self._rows: dict[Key, _Remembered] = {}

    def prefix(self, rows: list[int], ids_BP: Tensor, mask_BP: Tensor, pool_BP: Tensor, compute: Compute) -> Prefix:
        """The prefixes of a batch: remembered rows are copied, the others computed together and then remembered."""
        keys = list(zip(rows, mask_BP.sum(dim=1).tolist(), strict=True))
        known = [key in self._rows for key in keys]
        self.lookups += len(rows)
        self.hits += sum(known)
        held = {key: self._rows[key] for key, hit in zip(keys, known, strict=True) if hit}
        missing = [at for at, hit in enumerate(known) if not hit]
        if missing:
            width = int(mask_BP[missing].sum(dim=1).max())
            cut = ids_BP.shape[1] - max(width, 1)
            fresh = compute(ids_BP[missing, cut:], mask_BP[missing, cut:], pool_BP[missing, cut:])
            if len(missing) == len(rows) and not cut:
                self._remember(keys, fresh)
                return fresh
            held |= self._remember([keys[b] for b in missing], fresh)
        return _assemble([held[key] for key in keys], ids_BP.shape[1], ids_BP.device)

    def _remember(self, keys: list[Key], fresh: Prefix) -> dict[Key, _Remembered]:
        new = {}
        for i, key in enumerate(keys):
            start = fresh.keys[0].shape[2] - key[1]
            pairs = [torch.stack([k[i, :, start:], v[i, :, start:]]) for k, v in zip(*fresh[:2], strict=True)]
            new[key] = item = _Remembered(
                torch.stack(pairs).cpu(), torch.stack([fresh.last_BD[i], fresh.pooled_BD[i]]).cpu()
            )
            if key not in self._rows and self.num_bytes + item.num_bytes <= self.budget_bytes:
                self._rows[key] = item
                self.num_bytes += item.num_bytes
        return new


def _assemble(held: list[_Remembered], width: int, device: torch.device) -> Prefix:
    layers, two, heads, _, size = held[0].kv.shape
    kv = held[0].kv.new_zeros(layers, two, len(held), heads, width, size)
    for b, item in enumerate(held):
        kv[:, :, b, :, width - item.kv.shape[3] :] = item.kv
    kv = kv.to(device, non_blocking=True)
    hidden = torch.stack([item.hidden for item in held]).to(device)
    return Prefix(tuple(kv[:, 0]), tuple(kv[:, 1]), hidden[:, 0], hidden[:, 1])
