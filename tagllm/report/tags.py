"""`tagllm inspect`: what the rows of tags lie near, and how alike tags are.

V tokens, P rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from tagllm.tags import Tag, TagLibrary


def inspect_library(path: Path, model: str | None, nearest: int) -> Iterator[Table]:
    """A table per tag, and one of all tags.

    Args:
        model: another place of the same backbone than the library names.

    Raises:
        UserError: no library, or another backbone than its own.
    """
    from tagllm.config import BackboneConfig
    from tagllm.model.backbone import load_backbone

    library = TagLibrary.load(path)
    config = BackboneConfig(model=model or library.backbone.name, dtype="fp32")
    backbone = load_backbone(config, torch.device("cpu"))
    library.backbone.require_same(backbone.identity, str(path))
    embedding_VD = backbone.embedding().float()
    for tag in library.tags.values():
        yield _rows(tag, embedding_VD, backbone.tokenizer, nearest)
    yield _alike(list(library.tags.values()))


def nearest_tokens(rows_PD: Tensor, embedding_VD: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Cosines and ids (P, number) of the tokens whose embeddings point most nearly the same way."""
    cosine_PV = nn.functional.normalize(rows_PD, dim=1) @ nn.functional.normalize(embedding_VD, dim=1).T
    best = cosine_PV.topk(number, dim=1)
    return best.values, best.indices


def cosine_of_means(tags: Sequence[Tag]) -> Tensor:
    """(T, T): of the mean rows of each two tags."""
    means = nn.functional.normalize(torch.stack([tag.rows_PD.mean(dim=0) for tag in tags]), dim=1)
    return means @ means.T


def _rows(tag: Tag, embedding_VD: Tensor, tokenizer: Any, nearest: int) -> Table:
    usual = float(embedding_VD.norm(dim=1).mean())
    table = Table(title=f"<{tag.name}>, {tag.kind}; a token's norm is {usual:.2f}", title_justify="left")
    for title in ("row", "norm", "nearest tokens (cosine)"):
        table.add_column(title, justify="left" if title.startswith("nearest") else "right")
    cosines, ids = nearest_tokens(tag.rows_PD, embedding_VD, nearest)
    for at, row_D in enumerate(tag.rows_PD):
        near = (f"{tokenizer.decode([int(i)])!r} {c:.2f}" for i, c in zip(ids[at], cosines[at], strict=True))
        table.add_row(str(at), f"{row_D.norm():.2f}", "  ".join(near))
    return table


def _alike(tags: Sequence[Tag]) -> Table:
    table = Table(title="cosine of mean rows", title_justify="left")
    for title in ("", *(f"<{tag.name}>" for tag in tags)):
        table.add_column(title, justify="right" if title else "left")
    for tag, cosines in zip(tags, cosine_of_means(tags), strict=True):
        table.add_row(f"<{tag.name}>", *(f"{value:.2f}" for value in cosines.tolist()))
    return table
