"""Rotary positions of keys that were computed from position 0 on and now stand elsewhere.

Scores depend on the turn between query and key only, so instead of turning the keys of a piece on to each row's offset
(a copy for every row), the few queries are turned back by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2")


class Rotation(NamedTuple):
    """Angle per position of each pair of channels, (E / 2)."""

    frequency_e: Tensor

    @classmethod
    def of(cls, backbone: Any) -> Rotation | None:
        """None where the backbone is not known to turn whole heads, in halves, by one fixed set of angles."""
        config = backbone.config.get_text_config()
        rotary = getattr(backbone.base_model, "rotary_emb", None)
        frequency_e = getattr(rotary, "inv_freq", None)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        fixed = config.model_type in FAMILIES and getattr(rotary, "rope_type", None) in ("default", "linear", "llama3")
        if frequency_e is None or not fixed or 2 * len(frequency_e) != head_size:
            return None
        return cls(frequency_e)

    def turn(self, offset_B: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, 1, 1, E) of a turn by so many positions."""
        angle_BE = (offset_B[:, None].float() * self.frequency_e.to(offset_B.device).float()).repeat(1, 2)
        return angle_BE.cos()[:, None, None], angle_BE.sin()[:, None, None]


def turned_back(states_BHSE: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Channels i and i + E / 2 are a pair (the layout of transformers' `rotate_half`)."""
    cos, sin = turn
    first, second = states_BHSE.float().chunk(2, dim=3)
    return states_BHSE.float() * cos + torch.cat([second, -first], dim=3) * sin
