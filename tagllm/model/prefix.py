"""What is kept of frozen stretches of prompts: their keys and values, and what heads and probes read of them.

Everything before the first learned row is a constant of the data (attention is causal), so keys and values computed
once, without a graph, give the same gradient as the plain full backward. Where the backbone is replicated they are
remembered, by a digest of all that they depend on.

n pieces, T positions of the longest, D hidden size, E head size, G means over fields that heads read (of each layer,
and there of each pool).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tagllm.data.batch import Tokens
from tagllm.model.attention import FrozenKeys

POSITIONS_AT_ONCE = 1024
"""In a pass on a CPU, unless one stretch has more."""
SCORE_BYTES = 1 << 30
"""Of fp32 attention scores in a pass on a GPU, unless one stretch has more; attention holds them three times. Where
stretches see shared keys no kernel of torch's or flash-attn's is there to do without."""


class Piece(NamedTuple):
    """Keys and values (layers, 2, heads, length, E); the last state and behind it the sums over positions, fp32
    (1 + G, D); positions and spans (2, length)."""

    kv: Tensor
    states_SD: Tensor
    place: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def to(self, device: torch.device) -> Piece:
        return Piece(*(tensor.to(device, non_blocking=True) for tensor in self))


class Prefix(NamedTuple):
    """What the live pass builds on (`parts`), and per row the last state and the sums over positions."""

    parts: list[FrozenKeys]
    last_BD: Tensor
    pooled_BGD: Tensor


def in_passes(tokens: Tokens, chosen: Sequence[int], heads: int, keys_before: int) -> list[list[int]]:
    """Which of the chosen stretches go through the backbone together: those that are alike in length, since attention
    pads them to the longest. On a CPU few; on a GPU, where they see keys in front of them, as many as there is room
    for scores of one layer (alone they go to a kernel that keeps none).

    Args:
        keys_before: the most that any stretch sees in front of it.
    """
    passes: list[list[int]] = []
    by_length = sorted(chosen, key=lambda i: -tokens.lengths[i])
    if tokens.ids_N.device.type != "cpu":
        while by_length:
            longest = tokens.lengths[by_length[0]]
            room = SCORE_BYTES // max(1, score_bytes(heads, longest, keys_before)) if keys_before else len(by_length)
            rows = max(1, room)
            passes, by_length = [*passes, sorted(by_length[:rows])], by_length[rows:]
        return passes
    room = 0
    for i in by_length:
        if not passes or tokens.lengths[i] > max(room, 0):
            passes.append([])
            room = POSITIONS_AT_ONCE
        passes[-1].append(i)
        room -= tokens.lengths[i]
    return [sorted(some) for some in passes]


def score_bytes(heads: int, positions: int, keys_before: int) -> int:
    """Of fp32 attention scores of one stretch in one layer."""
    return 4 * heads * positions * (keys_before + positions)


def cut_into_pieces(
    tokens: Tokens, keys: Sequence[Tensor], values: Sequence[Tensor], last_ND: Tensor, read_ND: Sequence[Tensor],
    num_pools: int,
) -> list[Piece]:  # fmt: skip
    """One piece per stretch; `keys` and `values` of each layer (1, heads, N, E); `read_ND` of each layer with means."""
    kv = torch.stack([torch.stack([k[0], v[0]]) for k, v in zip(keys, values, strict=True)])
    place = torch.stack([tokens.at_N, tokens.span_N])
    pieces, start = [], 0
    for length in tokens.lengths:
        here = slice(start, start + length)
        in_pool = [tokens.pool_N[here, None] == pool for pool in range(1, num_pools + 1)]
        sums = [(states_ND[here].float() * inside).sum(dim=0) for states_ND in read_ND for inside in in_pool]
        last_D = last_ND[here][-1].float() if length else torch.zeros_like(sums[0])
        pieces.append(Piece(kv[:, :, :, here].contiguous(), torch.stack([last_D, *sums]), place[:, here].clone()))
        start += length
    return pieces


def part_of(rows: Sequence[Sequence[Piece]], room: int = 0) -> FrozenKeys:
    """Each row's pieces one behind the other, the rows side by side, padded to the longest, and room for more keys
    behind it. On a CPU in fp32, the dtype of attention over them."""
    first = rows[0][0]
    dtype = torch.float32 if first.kv.device.type == "cpu" else first.kv.dtype
    if len(rows) == len(rows[0]) == 1 and not room:
        kv, place = first.kv[:, :, None].to(dtype), first.place[:, None]
        return FrozenKeys(tuple(kv[:, 0]), tuple(kv[:, 1]), place[0], place[1], (first.kv.shape[3],))
    lengths = tuple(sum(piece.kv.shape[3] for piece in row) for row in rows)
    layers, two, heads, _, size = first.kv.shape
    kv = first.kv.new_zeros(layers, two, len(rows), heads, max(lengths) + room, size, dtype=dtype)
    place = first.place.new_full((2, len(rows), max(lengths)), -1)
    for i, row in enumerate(rows):
        start = 0
        for piece in row:
            end = start + piece.kv.shape[3]
            kv[:, :, i, :, start:end] = piece.kv
            place[:, i, start:end] = piece.place
            start = end
    return FrozenKeys(tuple(kv[:, 0]), tuple(kv[:, 1]), place[0], place[1], lengths)


class PrefixMemory:
    """Pieces seen before, first on the device, then in host memory (pinned for CUDA), each under a byte budget.

    What has been admitted stays: epochs visit every row equally often, so an LRU would drop each piece right before its
    next use, while a memory that is full for good keeps hitting in proportion to its size.
    Only for replicated backbones: under ZeRO-3 a rank that skips a pass while another runs it would hang both.
    """

    def __init__(self, device_bytes: int, host_bytes: int) -> None:
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        self.used_device = self.used_host = 0
        self.hits = self.lookups = 0
        self._pieces: dict[bytes, Piece] = {}

    def recall(self, key: bytes, device: torch.device) -> Piece | None:
        self.lookups += 1
        piece = self._pieces.get(key)
        if piece is None:
            return None
        self.hits += 1
        return piece.to(device)

    def admit(self, key: bytes, piece: Piece) -> None:
        if key in self._pieces:
            return
        on_device = piece.kv.device.type != "cpu"
        if on_device and self.used_device + piece.num_bytes <= self.device_bytes:
            self.used_device += piece.num_bytes
            self._pieces[key] = piece
        elif self.used_host + piece.num_bytes <= self.host_bytes:
            self.used_host += piece.num_bytes
            host = piece.to(torch.device("cpu"))
            self._pieces[key] = Piece(*(tensor.pin_memory() for tensor in host)) if on_device else host
