"""`tagllm inspect`: what the rows of tags lie near, how alike tags are, and all of it in TensorBoard's projector.

V tokens, P rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from tagllm.files import writing
from tagllm.tags import Tag, TagLibrary

SAMPLED = 2000
"""Tokens of the vocabulary that the projector shows beside the nearest ones."""


class Vocabulary(NamedTuple):
    """Embeddings of the tokens of a library's backbone, and what they say."""

    embedding_VD: Tensor
    tokenizer: Any

    @classmethod
    def of(cls, library: TagLibrary, path: Path, model: str | None) -> Vocabulary:
        """
        Args:
            model: another place of the same backbone than the library names.

        Raises:
            UserError: another backbone than its own.
        """
        from tagllm.model.backbone import load_vocabulary

        embedding_VD, tokenizer, identity = load_vocabulary(model or library.backbone.name)
        library.backbone.require_same(identity, str(path))
        return cls(embedding_VD, tokenizer)

    def text(self, token: int) -> str:
        return repr(self.tokenizer.decode([token]))


def inspect_library(library: TagLibrary, vocabulary: Vocabulary, nearest: int) -> Iterator[Table]:
    """A table per tag, and one of all tags."""
    for tag in library.tags.values():
        yield _rows(tag, vocabulary, nearest)
    yield _alike(list(library.tags.values()))


def write_projector(library: TagLibrary, vocabulary: Vocabulary, nearest: int, folder: Path) -> int:
    """Rows of all tags, the tokens nearest to them and an even sample of the others, for TensorBoard's embedding
    projector; returns how many points there are.

    Raises:
        UserError: the folder cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    points, labels, tokens = [], list[list[str]](), set[int]()
    for tag in library.tags.values():
        points.append(tag.rows_PD)
        labels += [[f"<{tag.name}> {at}", tag.name, tag.kind] for at in range(len(tag.rows_PD))]
        tokens |= set(nearest_tokens(tag.rows_PD, vocabulary.embedding_VD, nearest)[1].flatten().tolist())
    total = len(vocabulary.embedding_VD)
    tokens |= set(range(0, total, max(1, total // SAMPLED)))
    chosen = sorted(tokens)
    points.append(vocabulary.embedding_VD[chosen])
    labels += [[vocabulary.text(token), "vocabulary", "token"] for token in chosen]
    with writing(folder, "Give another folder with --projector."), SummaryWriter(str(folder)) as writer:
        writer.add_embedding(torch.cat(points), labels, metadata_header=["text", "tag", "kind"], tag="tags")
    return len(labels)


def nearest_tokens(rows_PD: Tensor, embedding_VD: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Cosines and ids (P, number) of the tokens whose embeddings point most nearly the same way."""
    cosine_PV = nn.functional.normalize(rows_PD, dim=1) @ nn.functional.normalize(embedding_VD, dim=1).T
    best = cosine_PV.topk(min(number, len(embedding_VD)), dim=1)
    return best.values, best.indices


def cosine_of_means(tags: Sequence[Tag]) -> tuple[list[str], Tensor]:
    """The tags that have rows (absent ones have none), as they stand in a prompt, and (T, T) of the mean rows of each
    two of them."""
    with_rows = [tag for tag in tags if len(tag.rows_PD)]
    if not with_rows:
        return [], torch.empty(0, 0)
    means = nn.functional.normalize(torch.stack([tag.rows_PD.mean(dim=0) for tag in with_rows]), dim=1)
    return [f"<{tag.name}>" for tag in with_rows], means @ means.T


def _rows(tag: Tag, vocabulary: Vocabulary, nearest: int) -> Table:
    usual = float(vocabulary.embedding_VD.norm(dim=1).mean())
    table = Table(title=f"<{tag.name}>, {tag.kind}; a token's norm is {usual:.2f}", title_justify="left")
    for title in ("row", "norm", "nearest tokens (cosine)"):
        table.add_column(title, justify="left" if title.startswith("nearest") else "right")
    cosines, ids = nearest_tokens(tag.rows_PD, vocabulary.embedding_VD, nearest)
    for at, row_D in enumerate(tag.rows_PD):
        near = (f"{vocabulary.text(int(i))} {c:.2f}" for i, c in zip(ids[at], cosines[at], strict=True))
        table.add_row(str(at), f"{row_D.norm():.2f}", "  ".join(near))
    return table


def _alike(tags: Sequence[Tag]) -> Table:
    names, cosine_TT = cosine_of_means(tags)
    table = Table(title="cosine of mean rows", title_justify="left")
    for title in ("", *names):
        table.add_column(title, justify="right" if title else "left")
    for name, cosines in zip(names, cosine_TT.tolist(), strict=True):
        table.add_row(name, *(f"{value:.2f}" for value in cosines))
    return table
