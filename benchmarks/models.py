"""The backbone of a benchmark, in two forms: as transformers loads it (for the peers) and as tagllm does (for ours)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tagllm.baselines.plain import load_plain, twin
from tagllm.config import BackboneConfig
from tagllm.model.backbone import Backbone, load_backbone


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
        settings = self.settings
        return load_plain(BackboneConfig(model=settings.model, dtype=settings.dtype), settings.device)

    def twin(self) -> Any:
        return twin(self.plain.model)


def tiny_model(folder: Path) -> str:
    """The random two-layer llama of the tests, for `--quick`."""
    from tests.tiny import save_backbone

    return str(save_backbone(folder / "tiny"))
