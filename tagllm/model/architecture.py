"""What a decoder of transformers must be for prefixes to be frozen, and what it does behind its LM head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tagllm.errors import UserError

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


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
        "that uses transformers' attention interface and nothing beside it: Llama, Mistral, Qwen, Gemma, GPT-2 and "
        "most others."
    )


def _unknown(model: Any) -> Iterator[str]:
    text = model.config.get_text_config()
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


def logit_factor(config: Any) -> float:
    """What the logits of the LM head are multiplied by, of a text config. No head of such a family has a bias, so the
    hidden states may be instead."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "output_multiplier", None) or 1.0  # Cohere, Muse
    scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by it, HyperCLOVA X multiplies
    return float(factor * scaling if config.model_type.startswith("hyperclovax") else factor / scaling)
