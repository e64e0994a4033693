"""Reads a backbone tensor by tensor: each is cast, quantised, moved and (where told so) sharded before the next one is
read, so that no rank ever holds more than its own part and the tensor at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tagllm import launched
from tagllm.config import Quantization
from tagllm.errors import UserError
from tagllm.model.allocator import return_freed_memory
from tagllm.model.architecture import require_supported
from tagllm.model.frozen import make_frozen_aware
from tagllm.model.linear import FrozenLinear
from tagllm.model.quantize import quantised

QUANTISED_AT_LEAST = 0.9
"""Of the decoder's weights; of Llama's, maps are .9999."""

SAMPLED = 64
"""Numbers of each map of the decoder that its digest is of."""

HUB_FILES, NOT_READ = ["*.json", "*.safetensors"], ["consolidated*", "original/*"]
"""What is downloaded, and what of it is not: the same weights once more, as their authors' own code reads them."""

Place = Callable[[nn.Module], None]
"""Called with each module as soon as its own weights are there: shards them."""


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds no more than a part of it (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class Loaded(NamedTuple):
    """A model, what gives its whole token embedding (V, D), and the digest of its decoder."""

    model: Any
    embedding: Callable[[], Tensor]
    decoder: str


class TensorStore(Protocol):
    """Tensors by the names that a model has for them."""

    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> Tensor: ...


class SafeTensors:
    """The safetensors files of a folder. Each tensor is read by itself and its file closed, so that nothing stays."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """`prefix`: of the base model, which some files leave out."""
        self._folder, self._prefix = folder, f"{prefix}."
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            self._file_of = dict.fromkeys(self._names_in("model.safetensors"), "model.safetensors")

    def __contains__(self, name: object) -> bool:
        return self._stored(str(name)) in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        stored = self._stored(name)
        with safe_open(self._folder / self._file_of[stored], framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored).clone()
        return tensor

    def _stored(self, name: str) -> str:
        return name if name in self._file_of else name.removeprefix(self._prefix)

    def _names_in(self, file: str) -> list[str]:
        from safetensors import safe_open

        if not (self._folder / file).is_file():
            return []
        with safe_open(self._folder / file, framework="pt") as opened:
            return list(opened.keys())


def load_model(
    name: str, dtype: torch.dtype, device: torch.device, quantize: Quantization = "none", place: Place | None = None
) -> Loaded:
    """A frozen-aware causal LM, frozen and in eval mode.

    Args:
        name: a folder or a hub name.

    Raises:
        OSError, ValueError, ImportError: transformers cannot make it.
        UserError: its weights are quantised already, are not those of its config, or cannot be quantised here.
    """
    return_freed_memory()
    model = skeleton(name, dtype)
    if quantize != "none":
        _refuse_unquantisable(name, model, quantize)
    _make_buffers(model, device)
    weights = _weights(name, model, place is not None)
    table = _table_of(model)
    decoder = _fill(model, weights, dtype, device, quantize, place)
    if place is None:
        return Loaded(model, model.get_input_embeddings().weight.detach, decoder)
    return Loaded(model, lambda: weights[table].to(dtype), decoder)


def load_embedding(name: str) -> tuple[Any, Tensor]:
    """The model without weights, and its token embedding (V, D) in fp32; raises what `load_model` does."""
    model = skeleton(name, torch.float32)
    return model, _weights(name, model, sharded=False)[_table_of(model)].float()


def _table_of(model: Any) -> str:
    """The name of the token embedding."""
    table = model.get_input_embeddings().weight
    name: str = next(name for name, parameter in model.named_parameters() if parameter is table)
    return name


def skeleton(name: str, dtype: torch.dtype) -> Any:
    """The frozen-aware model without weights, all on torch's meta device.

    Raises:
        OSError, ValueError: transformers cannot make it.
        UserError: its weights are quantised already.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name)
    _refuse_quantised(name, config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    require_supported(model)  # before gigabytes are read
    model.requires_grad_(False).eval()
    make_frozen_aware(model)
    return model


def _refuse_quantised(name: str, config: Any) -> None:
    """Such files hold integers or floats of 8 bits, and their scales under names that the model does not have."""
    for one in (config, config.get_text_config()):
        held = getattr(one, "quantization_config", None)
        if held is not None:
            method = held.get("quant_method", "unknown") if isinstance(held, dict) else held.quant_method
            raise UserError(
                f"backbone.model: {name} is already quantised ({getattr(method, 'value', method)}); tags are trained "
                "on weights that are quantised here. Load the unquantised model, and set backbone.quantize."
            )


def _refuse_unquantisable(name: str, model: Any, quantize: Quantization) -> None:
    """Only linear maps are quantised; experts in one tensor of three dimensions, nearly all of a model, are none."""
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    total = sum(p.numel() for p in model.base_model.parameters() if id(p) not in tables)
    maps = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, FrozenLinear))
    if maps < QUANTISED_AT_LEAST * total:
        raise UserError(
            f"backbone.quantize is {quantize}, but only {maps / total:.0%} of the decoder of {name} "
            f"({model.config.model_type}) are linear maps, which alone are quantised; at least "
            f"{QUANTISED_AT_LEAST:.0%} must be. Set backbone.quantize=none and shard it (engine.zero_stage=3), or take "
            "a model without experts."
        )


def _weights(name: str, model: Any, sharded: bool) -> TensorStore:
    """The files themselves; where they name tensors otherwise, or are no safetensors, what transformers makes of it."""
    from transformers import AutoModelForCausalLM

    found = SafeTensors(local_folder(name), model.base_model_prefix)
    if all(any(alias in found for alias in aliases) for aliases in _aliases(model)):
        return found
    if sharded and launched.rank() == 0:
        print(
            f"warning: {name}: its files name tensors otherwise than the model, or are no safetensors, so while it "
            f"loads every rank holds all of it on the host, {_gib(model):.1f} GiB. Start fewer ranks per node if that "
            "is too much.",
            flush=True,
        )
    whole: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(name, dtype="auto").state_dict()
    return whole


def _gib(model: nn.Module) -> float:
    return sum(p.numel() * p.itemsize for p in model.parameters()) / 2**30


def local_folder(name: str) -> Path:
    """Of the files, which are downloaded first where `name` is no folder."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=NOT_READ))


def _aliases(model: nn.Module) -> Iterator[list[str]]:
    """All names of each parameter; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield from names.values()


def _make_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no file has (rotary frequencies): transformers computes them when it initialises their module."""
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            module._buffers[name] = torch.zeros_like(module._buffers[name], device="cpu")
        if empty:
            model._init_weights(module)
        for name in empty:
            module._buffers[name] = module._buffers[name].to(device)


def _fill(
    model: Any, weights: TensorStore, dtype: torch.dtype, device: torch.device, quantize: Quantization,
    place: Place | None,
) -> str:  # fmt: skip
    """Returns the digest of the decoder: of a few numbers of each map as the files have it, whatever its name."""
    samples = []
    names = {alias: aliases for aliases in _aliases(model) for alias in aliases}
    tied: dict[str, nn.Parameter] = {}
    # children first, as sharding wants it; by name, so that a map which was quantised is gone
    for name in reversed([name for name, _ in model.named_modules()]):
        module: nn.Module = model.get_submodule(name)
        for at, empty in module._parameters.items():
            if empty is None:
                continue
            aliases = names[f"{name}.{at}".removeprefix(".")]
            parameter = tied.get(aliases[0])
            if parameter is None:
                stored = _sound(next(alias for alias in aliases if alias in weights), weights, empty)
                parameter = nn.Parameter(stored.to(device, dtype), requires_grad=False)
                samples += [_sample(stored)] if stored.ndim == 2 else []
            if len(aliases) > 1:
                tied[aliases[0]] = parameter
            module._parameters[at] = parameter
        for at, buffer in module._buffers.items():
            stored_as = f"{name}.{at}".removeprefix(".")
            if buffer is not None and at not in module._non_persistent_buffers_set and stored_as in weights:
                module._buffers[at] = weights[stored_as].to(device, buffer.dtype)  # what routers add to choose experts
        if type(module) is FrozenLinear:  # not the LM head
            module = quantised(module, quantize)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        if place is not None:
            place(module)
    return hashlib.sha256(b"".join(sorted(samples))).hexdigest()


def _sample(stored: Tensor) -> bytes:
    """Evenly spaced, rounded to bf16, so that it is the same in files of every dtype."""
    at = torch.linspace(0, stored.numel() - 1, min(SAMPLED, stored.numel()), dtype=torch.float64).long()
    return stored.reshape(-1)[at].to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _sound(name: str, weights: TensorStore, empty: Tensor) -> Tensor:
    """A stored tensor that is what the config says: others would broadcast, or be cast to numbers without meaning."""
    stored = weights[name]
    if stored.shape != empty.shape or not stored.is_floating_point() or stored.itemsize < 2:
        found, expected = tuple(stored.shape), tuple(empty.shape)
        raise UserError(
            f"backbone.model: its tensor {name} is {found} {str(stored.dtype).removeprefix('torch.')}; by its config "
            f"it must be {expected}, in floats of 16 bits or more. Load the unquantised model that config.json is of."
        )
    return stored
