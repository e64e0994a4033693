"""Bytes that one decoder layer keeps for backward, per token: `python -m benchmarks.saved_bytes`.

Frozen weights, no prefix, transformers' own SDPA. Counted are distinct storages that autograd saves, without
parameters; the figure of a layer is a model of two layers minus one of one layer, so that what all layers share (rotary
tables, masks) drops out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tagllm.model.frozen import make_frozen_aware

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3),
    "Llama-2-7B": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32),
}


class Kind(NamedTuple):
    frozen_aware: bool
    zero3_linear: bool
    residual: torch.dtype


KINDS = {
    "nn.Linear, bf16 stream": Kind(False, False, torch.bfloat16),
    "DeepSpeed ZeRO-3 linear, bf16 stream": Kind(False, True, torch.bfloat16),
    "FrozenLinear, bf16 stream": Kind(True, False, torch.bfloat16),
    "FrozenLinear, fp32 stream": Kind(True, False, torch.float32),
}


@contextmanager
def _zero3_linear() -> Iterator[None]:
    """What `deepspeed.zero.Init` does to `torch.nn.functional.linear`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    plain, functional.linear = functional.linear, zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = plain


def saved_bytes(shape: dict[str, Any], num_layers: int, kind: Kind, num_tokens: int) -> int:
    config = LlamaConfig(**shape, num_hidden_layers=num_layers, vocab_size=8)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.zero_()
    if kind.frozen_aware:
        make_frozen_aware(model)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    embedded = torch.zeros(1, num_tokens, config.hidden_size, dtype=kind.residual, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        _zero3_linear() if kind.zero3_linear else nullcontext(),
    ):
        model.base_model(inputs_embeds=embedded, use_cache=False)
    return sum(storage.nbytes() for at, storage in kept.items() if at not in known)


def per_token_and_layer(shape: dict[str, Any], kind: Kind, num_tokens: int) -> float:
    two, one = (saved_bytes(shape, layers, kind, num_tokens) for layers in (2, 1))
    return (two - one) / num_tokens


def main(
    tokens: Annotated[int, typer.Option(help="Positions of the one row.")] = 64,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the table.")] = None,
) -> None:
    """Prints KiB kept for backward per token and layer, for plain, DeepSpeed's and frozen-aware linear maps."""
    table = {
        name: {kind: per_token_and_layer(shape, KINDS[kind], tokens) for kind in KINDS}
        for name, shape in SHAPES.items()
    }
    print(f"{'KiB per token and layer':38s}" + "".join(f"{name:>16s}" for name in SHAPES))
    for kind in KINDS:
        print(f"{kind:38s}" + "".join(f"{table[name][kind] / 1024:16.1f}" for name in SHAPES))
    if output:
        output.write_text(json.dumps({"tokens": tokens, "bytes_per_token_and_layer": table}, indent=2))


if __name__ == "__main__":
    typer.run(main)
