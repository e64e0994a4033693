"""Tiny random backbones, a small tokenizer and hand-made examples for tests."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from tagllm.config import HeadConfig
from tagllm.data.batch import Batch, count
from tagllm.data.collate import Collator
from tagllm.data.encode import Example
from tagllm.data.layout import TagLayout
from tagllm.head import Head
from tagllm.model.frozen import make_frozen_aware
from tagllm.model.loss import LossWeights, total
from tagllm.model.prefix import PrefixMemory
from tagllm.model.tagged import Output, TaggedModel
from tagllm.tags import Tag
from tagllm.template import OUTPUT, SPAN, TAG, TEXT

VOCABULARY, HIDDEN = 96, 32
_SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, head_dim=8,
)  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**{k: v for k, v in _SHAPE.items() if k != "head_dim"}),
    "gemma": GemmaConfig(**_SHAPE),
    "gemma2": Gemma2Config(**_SHAPE, sliding_window=12, final_logit_softcapping=5.0),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=256),
}
KINDS = {"Frozen": "domain", "Learned": "domain", "F": "function", "Text": "function"}
HEAD = HeadConfig(reads="both", outputs=2)


def plain_backbone(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """As transformers makes it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    with torch.no_grad():  # the usual .02 makes activations so small that errors hide
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.to(dtype).eval().requires_grad_(False)


def backbone(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """As `load_backbone` gives it."""
    model = plain_backbone(family, seed, dtype)
    make_frozen_aware(model)
    return model


def layout(learned: Sequence[str] = ("F",), length: int = 3, num_pools: int = 1) -> TagLayout:
    """With more pools than one, each span is a pool of its own."""
    return TagLayout.of(VOCABULARY, KINDS, dict.fromkeys(KINDS, length), learned, {"F": HEAD}, tuple(range(num_pools)))


def tags(of: TagLayout, seed: int = 1) -> dict[str, Tag]:
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, kind in of.kinds.items():
        head = None
        if name in of.heads:
            blank = Head.new(of.heads[name], HIDDEN, of.pools)
            weight = torch.randn(blank.weight_KF.shape, generator=random) * 0.1
            bias, mean, std = torch.tensor([[0.1, -0.2], [1.0, 2.0], [2.0, 0.5]])
            head = replace(blank, weight_KF=weight, bias_K=bias, mean_K=mean, std_K=std)
        made[name] = Tag(name, kind, torch.randn(of.lengths[name], HIDDEN, generator=random) * 0.3, head)
    return made


def model(of: TagLayout, family: str = "llama", remember: int = 0, dtype: torch.dtype = torch.float32) -> TaggedModel:
    return TaggedModel(backbone(family, dtype=dtype), tags(of), of, PrefixMemory(0, remember) if remember else None)


def example(
    of: TagLayout, pieces: Sequence[str | int], random: np.random.Generator, target: bool = True, group: int = -1
) -> Example:
    """`pieces`: a number is fixed text of so many tokens, `~n` a span, `>n` output, else a tag's name; `~n#s` has the
    content of seed s. Spans begin with the text in front of their tag. Rows of a group are alike up to their second
    span."""
    ids: list[int] = []
    marks: list[int] = []
    pools: list[int] = []
    read_at, function_at, begun_at, text_at = -1, -1, -1, -1
    fields_at, spans_at = [], []
    for piece in pieces:
        if isinstance(piece, str) and piece in of.kinds:
            new, mark = list(of.ids(piece)), TAG
            start = text_at if text_at >= 0 else len(ids)
            begun_at, text_at = start if of.kinds[piece] == "domain" else -1, -1
            function_at = len(ids) if of.kinds[piece] == "function" else function_at
            read_at = len(ids) + len(new) - 1 if piece in of.heads else read_at
        else:
            mark = TEXT if isinstance(piece, int) else {"~": SPAN, ">": OUTPUT}[piece[0]]
            size, _, seed = str(piece).lstrip("~>").partition("#")
            fixed = np.random.default_rng(int(seed or 0)) if seed or isinstance(piece, int) else random
            new = fixed.integers(1, VOCABULARY, int(size)).tolist()
            fields_at += [len(ids)] * (mark == SPAN)
            spans_at += [(begun_at, len(ids) + len(new))] * (mark == SPAN and begun_at >= 0)
            begun_at, text_at = -1, len(ids) if mark == TEXT else -1
        ids += new
        marks += [mark] * len(new)
        pools += [min(len(fields_at), of.num_pools) if mark == SPAN else 0] * len(new)
    has_target = read_at >= 0 and target
    return Example(
        np.array(ids, np.int32), np.array(marks, np.uint8), np.array(pools, np.uint8),
        random.normal(size=2).astype(np.float32) if has_target else np.zeros(0, np.float32),
        0 if read_at >= 0 else -1, read_at, function_at, 0, np.array(fields_at, np.int32),
        np.array(spans_at, np.int32).reshape(-1, 2), group, alike_to=fields_at[1] if group >= 0 else 0,
    )  # fmt: skip


def rows(of: TagLayout, seed: int = 0) -> list[Example]:
    """Ragged rows of every kind: regression, text output, without a prefix, a tag twice, without a target."""
    random = np.random.default_rng(seed)
    prompts: list[tuple[str | int, ...]] = [
        (4, "Frozen", "~9", 3, "F"),
        (2, "Frozen", "~4", "F"),
        (1, "Frozen", "~14", 2, "Text", ">5"),
        ("F", 2),
        (3, "F", "~3", 2, "F"),
        (5, "Frozen", "~6", "Text", ">1"),
    ]
    made = [example(of, prompt, random) for prompt in prompts]
    return [*made, example(of, (4, "Frozen", "~7", "F"), random, target=False)]


def collator(of: TagLayout, frozen: bool = True, terms: tuple[int, ...] = (OUTPUT,), **settings: bool) -> Collator:
    return Collator(of.first_learned_id, terms, 2, frozen, num_pools=of.num_pools, **settings)


def loss_of(
    tagged: TaggedModel, batch: Batch, weights: LossWeights = LossWeights(1.0, 1.0, 1.0)
) -> tuple[torch.Tensor, Output]:
    output = tagged(batch)
    return total(output.sums, count(batch), weights), output


def gradients(tagged: TaggedModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in tagged.named_parameters() if p.grad is not None}
    tagged.zero_grad()
    return found


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp(min=1e-12)).detach())


def save_backbone(folder: Path, family: str = "llama") -> Path:
    """A folder that `backbone.model` can name: tiny weights and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,()=#ĠĊ[]+-@/\\"))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    assert len(vocabulary) <= VOCABULARY
    backbone(family).save_pretrained(folder)
    return folder


def weights_digest(model: Any) -> str:
    """sha256 over every weight and buffer: frozen means this does not change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
