"""What a decoder of transformers must be for prefixes to be frozen, and what it does behind its LM head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tagllm.errors import UserError

OTHERS = "Llama, Mistral, Qwen, Gemma, GPT-2 and most others"
BESIDE = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
"""What architectures give to attention beside queries, keys and values. transformers makes no mask for ours, so one
that comes is the model's own."""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
MASKED_WINDOWS = {"phimoe", "qwen2_moe"}
"""Families that do not hand their window on to attention, which ours relies on: transformers makes no mask for it."""


def require_supported(model: Any) -> None:
    """
    Raises:
        UserError: a prefix is more than keys and values in this architecture, or attention sees more than those.
    """
    if whys := list(_unknown(model)):
        raise not_supported(model, " and ".join(whys))


def not_supported(model: Any, why: str) -> UserError:
    return UserError(
        f"backbone.model: the architecture {model.config.model_type} {why}, so prefixes cannot be frozen. Take one "
        f"that uses transformers' attention interface and nothing beside it: {OTHERS}."
    )


def require_known(module: nn.Module, mask: Tensor | None, others: Mapping[str, Any]) -> None:
    """What only a call of attention tells: `mask` and `others` are what came beside queries, keys and values.

    Raises:
        UserError: the layer adds to its scores, or looks at what stands behind.
    """
    if mask is not None or any(others.get(name) is not None for name in BESIDE):
        raise UserError(
            f"backbone.model: its {type(module).__name__} adds something of its own to the scores of attention, which "
            f"would be left out here. Take another architecture: {OTHERS}."
        )
    if getattr(module, "is_causal", True) is False:
        raise UserError(
            f"backbone.model: its {type(module).__name__} looks at what stands behind, too; tags are for models that "
            f"write from left to right. Take one of these: {OTHERS}."
        )


def changed_behind_the_cache(what: str) -> UserError:
    return UserError(
        f"backbone.model: its {what} changes keys or values behind the cache, so prefixes cannot be frozen. Take "
        f"another architecture: {OTHERS}."
    )


def _unknown(model: Any) -> Iterator[str]:
    text = model.config.get_text_config()
    if getattr(text, "is_heterogeneous", False):
        yield "has layers of different shapes"
        return  # which it does not answer questions about
    if getattr(text, "hidden_size_per_layer_input", 0):
        yield "adds embeddings of the tokens in every layer"
    others = sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS)
    if others:
        yield f"has layers other than full and sliding attention ({', '.join(others)})"
    elif getattr(model, "_is_stateful", False):
        yield "has recurrent layers"
    if getattr(text, "kv_lora_rank", None):
        yield "compresses its keys and values (multi-head latent attention)"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        yield "has attention sinks"
    if model.base_model is model:
        yield "does not tell its decoder from its LM head"
        return
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        yield "takes no positions"
    known = {id(p) for module in (model.base_model, model.get_output_embeddings()) for p in module.parameters()}
    if any(id(parameter) not in known for parameter in model.parameters()):
        yield "has maps between its decoder and its LM head"
    if model.config.model_type in MASKED_WINDOWS and _window(text):
        yield f"has a window of {_window(text)} positions that only its own mask knows"


def _window(text: Any) -> int:
    """Of its sliding layers, if that is less than the longest prompt; else 0."""
    types = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) or 0
    slides = types is None or "sliding_attention" in types
    return window if slides and window < text.max_position_embeddings else 0


def logit_factor(config: Any) -> float:
    """What the logits of the LM head are multiplied by, of a text config. No head of such a family has a bias, so the
    hidden states may be instead."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "output_multiplier", None) or 1.0  # Cohere, Muse
    scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by it, HyperCLOVA X multiplies
    return float(factor * scaling if config.model_type.startswith("hyperclovax") else factor / scaling)
