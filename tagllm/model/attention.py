"""Two-part attention: scores against the frozen prefix and against the live keys apart, one softmax over both.

Keys and values of the prefix are plain constants: never concatenated, copied, repeated over heads or differentiated
(concatenating made the backward of SDPA spend most of a step on gradients nobody needs).

B rows, H query heads, G key-value heads, R = H / G, Q live queries, P prefix and L live keys, E head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tagllm_two_part"


class Parts(NamedTuple):
    """Keys or values: constants of the prefix (B, G, P, E), and the live ones (B, G, L, E)."""

    prefix: Tensor
    live: Tensor


class _FrozenLayer(DynamicLayer):
    """One layer's prefix. `update` hands both parts on and keeps nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.keys is not None and self.values is not None
        return Parts(self.keys, key_states), Parts(self.values, value_states)


class FrozenCache(DynamicCache):
    """The keys and values of a prefix, for one live pass of a model under two-part attention."""

    def __init__(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
        super().__init__()
        for key, value in zip(keys, values, strict=True):
            layer = _FrozenLayer()  # type: ignore[no-untyped-call]
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            self.layers.append(layer)


def use_two_part_attention(model: Any) -> bool:
    """Switches a transformers model over; False (and no change) where its attention is not plain SDPA or eager."""
    if model.config._attn_implementation not in ("sdpa", "eager", NAME):
        return False
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Parts,
    value: Tensor | Parts,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface; gives (B, Q, H, E). No dropout: the backbone is frozen."""
    if isinstance(key, Tensor) and isinstance(value, Tensor) and softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    keys = [key] if isinstance(key, Tensor) else list(key)
    values = [value] if isinstance(value, Tensor) else list(value)
    B, H, Q, E = query.shape
    G = keys[-1].shape[1]
    grouped_BGrE = query.reshape(B, G, -1, E)  # R heads x Q queries in one matrix: heads are grouped, not repeated
    scores = torch.cat([grouped_BGrE @ part.transpose(2, 3) for part in keys], dim=3)
    scores = scores.float() * (E**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        allowed = attention_mask[:, :, None].expand(-1, G, H // G, -1, -1).reshape(scores.shape)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=3).to(query.dtype).split([part.shape[2] for part in keys], dim=3)
    out_BGrE = sum((w @ part for w, part in zip(weights[1:], values[1:], strict=True)), weights[0] @ values[0])
    return out_BGrE.view(B, H, Q, E).transpose(1, 2), None


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers leaves masks out where SDPA's `is_causal` would do; two parts have no such flag."""
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _whole_mask)
