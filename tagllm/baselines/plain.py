"""The backbone as any transformers user loads it, for methods that are not ours: nothing in it is exchanged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tagllm.config import BackboneConfig
from tagllm.errors import UserError
from tagllm.model.allocator import keep_freed_memory
from tagllm.model.backbone import DTYPES, Backbone, checkpoint_layers, fastest_dtype, identify, load_tokenizer, resolve


def load_plain(config: BackboneConfig, device: torch.device) -> Backbone:
    """Frozen, in eval mode, with transformers' SDPA attention.

    Raises:
        UserError: it cannot be loaded, or is quantised (by us, which PEFT knows nothing of).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if config.quantize != "none":
        raise UserError(
            f"backbone.quantize is {config.quantize}; methods that are not ours run on whole weights. Train the run "
            "with backbone.quantize=none."
        )
    tokenizer = load_tokenizer(config.model)  # says what cannot be loaded
    dtype = DTYPES[fastest_dtype(device) if config.dtype == "auto" else config.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(resolve(config.model), dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False).eval().to(device)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    if device.type == "cpu":
        keep_freed_memory()
    embedding_VD = model.get_input_embeddings().weight.detach()
    identity = identify(config.model, model.config.model_type, embedding_VD, tokenizer)
    return Backbone(model, tokenizer, identity, "sdpa", lambda: embedding_VD)


def twin(model: Any) -> Any:
    """A model of one's own over shared storage: modules and parameters may be replaced, not written to."""
    parameters: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, parameters)
