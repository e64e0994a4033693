"""The backbone of a benchmark, in two forms: as transformers loads it (for the peers) and as tagllm does (for ours)."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from tagllm.config import BackboneConfig
from tagllm.model.backbone import DTYPES, Backbone, identify, load_backbone, load_tokenizer, resolve


class Settings(NamedTuple):
    """What a run was asked for. `quick`: small rows and steps, for a tiny model; says nothing about speed."""

    model: str
    dtype: Literal["fp32", "bf16"]
    quick: bool
    protein_tokens: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def largest_micro_batch(self) -> int:
        return 8 if self.quick else 32

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Rows per micro-batch that every contestant is tuned over."""
        return tuple(size for size in (4, 8, 16, 32) if size <= self.largest_micro_batch)


class Models:
    """Loads what is asked for, once. Peers get twins: modules of their own over the same frozen weights.

    `scratch` is a folder for files that nobody needs afterwards.
    """

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings, self.scratch = settings, scratch

    @cached_property
    def tagged(self) -> Backbone:
        """The backbone as tagllm loads and changes it."""
        config = BackboneConfig(model=self.settings.model, dtype=self.settings.dtype, attention="sdpa")
        return load_backbone(config, self.settings.device)

    @cached_property
    def plain(self) -> Backbone:
        """The backbone as any transformers user loads it."""
        from transformers import AutoModelForCausalLM

        name = self.settings.model
        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve(name), dtype=DTYPES[self.settings.dtype], attn_implementation="sdpa"
        )
        model.requires_grad_(False).eval().to(self.settings.device)
        embedding_VD = model.get_input_embeddings().weight.detach()
        identity = identify(name, model.config.model_type, embedding_VD)
        return Backbone(model, load_tokenizer(name), identity, "sdpa", lambda: embedding_VD)

    def twin(self) -> Any:
        """A plain model of one's own over shared storage: modules and parameters may be replaced, not written to."""
        model = self.plain.model
        parameters: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
        return copy.deepcopy(model, parameters)


def tiny_model(folder: Path) -> str:
    """The random two-layer llama of the tests, for `--quick`."""
    from tests.tiny import save_backbone

    return str(save_backbone(folder / "tiny"))
