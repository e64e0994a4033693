"""Rows behind each other, padded for attention and joined again.

N positions, B rows, S the longest row, h heads, E size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tagllm.data.batch import Tokens


class RowPadding:
    """From rows behind each other to padded rows and back."""

    def __init__(self, tokens: Tokens) -> None:
        lengths, device, self.num_positions = tokens.lengths, tokens.ids_N.device, len(tokens.ids_N)
        self.num_rows, self.longest = len(lengths), max(lengths, default=0)
        self.even = len(set(lengths)) == 1 and self.num_positions == sum(lengths)
        lengths_B = torch.tensor(lengths, device=device)
        place_S = torch.arange(self.longest, device=device)
        self.there_BS = place_S < lengths_B[:, None]
        # pads point at a real position of their row: whatever is computed for them is finite, and dropped
        self.at_BS = (lengths_B.cumsum(0) - lengths_B)[:, None] + place_S.minimum((lengths_B[:, None] - 1).clamp(min=0))
        self.at_BS = self.at_BS.clamp(max=max(self.num_positions - 1, 0))
        if not self.even:
            starts = [i * self.longest for i in range(self.num_rows)]
            flat = [s + k for s, length in zip(starts, lengths, strict=True) for k in range(length)]
            self.slot_N = torch.tensor(flat, dtype=torch.long, device=device)

    def padded(self, values_N: Tensor) -> Tensor:
        """(N,) -> (B, S)."""
        return values_N[self.at_BS]

    def split(self, states_1hNE: Tensor) -> Tensor:
        """(1, h, N, E) -> (B, h, S, E)."""
        _, h, _, E = states_1hNE.shape
        states = states_1hNE[0]
        if not self.even:
            states = states.index_select(1, self.at_BS.flatten())
        return states.view(h, self.num_rows, self.longest, E).transpose(0, 1)

    def join(self, states_BhSE: Tensor) -> Tensor:
        """(B, h, S, E) -> (1, N, h, E); zeros at the dummy."""
        _, h, _, E = states_BhSE.shape
        states = states_BhSE.transpose(1, 2).reshape(-1, h, E)
        if not self.even:
            states = states.index_select(0, self.slot_N)
            states = functional.pad(states, (0, 0, 0, 0, 0, self.num_positions - len(self.slot_N)))
        return states[None].contiguous()
