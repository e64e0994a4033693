"""Loads the frozen LLM and its tokenizer, and says who it is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError

from tagllm.config import BackboneConfig
from tagllm.errors import UserError
from tagllm.model.allocator import keep_freed_memory
from tagllm.model.linear import PACK_UP_TO, FrozenLinear, cpu_multiplies_bf16
from tagllm.model.lm_head import FrozenHead
from tagllm.model.loading import Place, load_embedding, load_model, local_folder
from tagllm.model.smollm2 import smollm2_folder
from tagllm.tags import BackboneIdentity, Tag

PROBE = "The  QED of CC(=O)Oc1ccccc1C(=O)O is 0.55;\n\tMKTAYIAKQR has 10 residues. Été à Москва, Αθήνα: 東京"
"""Words, numbers, white space, formulae and scripts: tokenizers that cut all of it alike are taken for the same."""
_UNREADABLE = (OSError, ValueError, ImportError, SafetensorError)
"""The last: a download that was cut off."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Backbone(NamedTuple):
    """A transformers causal LM (frozen, eval mode), its tokenizer, and who it is."""

    model: Any
    tokenizer: Any
    identity: BackboneIdentity
    attention: str
    """What computes plain attention: sdpa or flash_attention_2."""
    embedding: Callable[[], torch.Tensor]
    """Gives the token embedding (V, D), whole where the backbone is sharded too."""

    @property
    def vocabulary_size(self) -> int:
        return self.identity.vocabulary_size

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def max_tokens(self) -> int:
        return longest_prompt(self.model.config)

    @property
    def token_scale(self) -> float:
        return token_scale(self.model)


def token_scale(model: Any) -> float:
    """What the embedding multiplies its table by (Gemma's: the root of D); tag rows stand beside the product."""
    module = model.get_input_embeddings()
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))


def longest_prompt(config: Any) -> int:
    """Tokens. Under LongRoPE a pass with a longer one turns all of its keys otherwise, and remembered ones would not
    fit its queries."""
    text = config.get_text_config()
    longest = int(getattr(text, "max_position_embeddings", 1 << 20))
    rope = getattr(text, "rope_parameters", None) or {}
    switch = [each for each in (rope, *rope.values()) if isinstance(each, dict) and each.get("rope_type") == "longrope"]
    return min([longest, *(int(each["original_max_position_embeddings"]) for each in switch)])


def resolve(name: str) -> str:
    """The folder or hub name to load from; `smollm2` is converted on first use."""
    return str(smollm2_folder()) if name == "smollm2" else name


def download(name: str) -> None:
    """Makes the files of a backbone be on this machine.

    Raises:
        UserError: as `load_backbone`.
    """
    try:
        local_folder(resolve(name))
    except _UNREADABLE as error:
        raise UserError(_cannot_load(name, error)) from None


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load(name, error)) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def as_trained(config: BackboneConfig, tags: Collection[Tag]) -> BackboneConfig:
    """With the dtype (where it is `auto`: measured anew it may be another one) and the quantisation (where nobody gave
    one) that all these tags were trained with: other weights give other answers."""
    known: dict[str, Any] = {}
    for key, open_ in (("dtype", config.dtype == "auto"), ("quantize", "quantize" not in config.model_fields_set)):
        held = {tag.about.get(key) for tag in tags}
        if open_ and len(held) == 1 and None not in held:  # tags made by hand do not say
            known |= {key: held.pop()}
    return config.model_copy(update=known)


def load_backbone(config: BackboneConfig, device: torch.device, place: Place | None = None) -> Backbone:
    """Loads, freezes, quantises and fingerprints the backbone.

    Args:
        place: shards each module as soon as it is loaded; None keeps everything here.

    Raises:
        UserError: neither a folder nor a hub name that can be reached, or not a causal LM.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dtype = DTYPES[fastest_dtype(device) if config.dtype == "auto" else config.dtype]
    attention = _attention(config, device, dtype)
    try:
        model, embedding, decoder = load_model(resolve(config.model), dtype, device, config.quantize, place)
    except _UNREADABLE as error:
        raise UserError(_cannot_load(config.model, error)) from None
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        raise UserError(
            f"backbone.model: {config.model} does not fit into {device} ({total:.0f} GiB). train and eval shard it "
            "over ranks (engine.zero_stage=3, under a launcher), predict and compose do there by themselves. "
            "Or set backbone.quantize=nf4 or int8, in training too, or take a larger GPU."
        ) from None
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    if device.type == "cpu":
        keep_freed_memory()
        multiply_fp32_in_onednn()
        pack_weights(model)
    tokenizer = load_tokenizer(config.model)
    identity = identify(config.model, model.config.model_type, embedding(), tokenizer, decoder)
    return Backbone(model, tokenizer, identity, attention, embedding)


def load_vocabulary(name: str) -> tuple[torch.Tensor, Any, BackboneIdentity]:
    """What tag rows stand beside (V, D; fp32), its tokenizer, and whose they are; nothing else is read.

    Raises:
        UserError: as `load_backbone`.
    """
    tokenizer = load_tokenizer(name)
    try:
        model, table_VD = load_embedding(resolve(name))
    except _UNREADABLE as error:
        raise UserError(_cannot_load(name, error)) from None
    return table_VD * token_scale(model), tokenizer, identify(name, model.config.model_type, table_VD, tokenizer)


def checkpoint_layers(model: Any) -> None:
    """Layers that are differentiated keep their input only. transformers' own switch would drop the frozen prefix."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    def keep_input(forward: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and hidden.requires_grad:
            return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)
        return forward(hidden, *args, **kwargs)

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(keep_input, layer.forward)


def multiply_fp32_in_onednn() -> None:
    """MKL multiplies fp32 at half the speed of oneDNN on AMD. torch leaves such products to oneDNN only if it may round
    to bf16, which oneDNN does where the CPU has units for bf16 matrices (AMX): there MKL stays."""
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, "bf16"
    exact = torch.full((320, 576), 1 + 2**-12)  # bf16 would make 1 of it
    if not torch.equal(exact @ torch.eye(576), exact) or not torch.equal(exact[None] @ torch.eye(576), exact[None]):
        products.fp32_precision = before


def pack_weights(model: Any) -> None:
    """Small bf16 maps keep a copy in the order that oneDNN reads, where it multiplies bf16 on this CPU; else it makes
    one in every product, a fifth of the time."""
    if not cpu_multiplies_bf16():
        return
    maps = [layer for layer in model.modules() if type(layer) in (FrozenLinear, FrozenHead)]
    if sum(layer.weight.nbytes for layer in maps) <= PACK_UP_TO:
        for layer in maps:
            layer.packs = layer.weight.dtype == torch.bfloat16


def _attention(config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> str:
    """flash-attn where it can be imported and can run: on CUDA, not in fp32."""
    able = device.type == "cuda" and dtype != torch.float32 and config.attention != "sdpa"
    missing = _flash_attn_missing() if able else ""
    usable = able and not missing
    if config.attention == "flash_attention_2" and not usable:
        said = f", which says: {missing}" if missing else ""
        raise UserError(
            f"backbone.attention is flash_attention_2; it needs the package flash-attn{said}, CUDA (here: "
            f"{device.type}) and bf16 (here: {str(dtype).removeprefix('torch.')}). With nvcc, in the checkout, "
            "run: pip install --no-build-isolation -e '.[gpu]'; or set backbone.attention=auto."
        )
    return "flash_attention_2" if usable else "sdpa"


def _flash_attn_missing() -> str:
    """Why what is used of flash-attn is not to be had; empty if it is. A folder of that name says little: flash-attn 4
    has one too, without this function, and a build for another torch fails here."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # noqa: BLE001  whatever a build for another torch raises
        return str(error).strip().partition("\n")[0] or repr(error)
    return ""


def identify(
    name: str, architecture: str, embedding_VD: torch.Tensor, tokenizer: Any, decoder: str = ""
) -> BackboneIdentity:
    """The fingerprint hashes 1,024 evenly spaced embedding rows rounded to bf16, so it is the same in every dtype. Of a
    tokenizer, what it makes of a text counts: which tokens, and whether one begins or ends it.

    Args:
        decoder: as `load_model` tells it; empty where the decoder was not looked at.
    """
    vocabulary_size, hidden_size = embedding_VD.shape
    rows = torch.linspace(0, vocabulary_size - 1, min(1024, vocabulary_size)).long()
    sample = embedding_VD[rows.to(embedding_VD.device)].to(torch.bfloat16).cpu().contiguous()
    fingerprint = hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()
    ids = tokenizer(PROBE).input_ids
    cuts = hashlib.sha256(repr([ids, tokenizer.eos_token_id]).encode()).hexdigest()
    return BackboneIdentity(name, architecture, hidden_size, vocabulary_size, fingerprint, decoder, cuts)


def fastest_dtype(device: torch.device) -> Literal["fp32", "bf16"]:
    """bf16 on accelerators; on a CPU whichever of bf16 and fp32 multiplies a decoder-sized matrix faster."""
    if device.type != "cpu":
        return "bf16"
    seconds = {name: min(_matmul_seconds(dtype) for _ in range(3)) for name, dtype in DTYPES.items()}
    # 1.5: bf16 must win clearly, since it costs precision and element-wise work on a CPU does not gain from it
    return "bf16" if seconds["bf16"] * 1.5 < seconds["fp32"] else "fp32"


def _matmul_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    a @ b
    start = time.perf_counter()
    for _ in range(5):
        a @ b
    return time.perf_counter() - start


def _cannot_load(name: str, error: Exception) -> str:
    from huggingface_hub import constants

    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    offline = " (offline: hub calls are blocked)" if constants.HF_HUB_OFFLINE else ""
    kind = "folder" if Path(name).exists() else "hub name"
    return (
        f"backbone.model is {name!r}; this {kind} cannot be loaded{offline}: {first} "
        "It must be `smollm2`, a folder saved by transformers, or a hub name."
    )
