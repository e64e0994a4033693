"""A run's own rows without its tags, as methods without tags see them.

B rows, S positions, K targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagllm.data.encode import Example
from tagllm.data.layout import TagLayout
from tagllm.data.pieces import tokens_of
from tagllm.errors import UserError


class Row(NamedTuple):
    """`pools`: which of the means that heads read a position goes into, from 1 (0: none)."""

    ids: NDArray[np.int64]
    pools: NDArray[np.uint8]
    target: NDArray[np.float32]


class Padded(NamedTuple):
    """Right-padded and without a mask: causal attention never looks at what stands behind. `last_B`: the last real
    position of each row."""

    ids_BS: Tensor
    pools_BS: Tensor
    last_B: Tensor
    target_BK: Tensor


class Untagged(NamedTuple):
    """Takes the tags out of examples. Nothing from the end of the head's tag on is kept.

    `names` holds tokens to put in the place of a tag, by the id of its first row.
    """

    vocabulary_size: int
    names: dict[int, list[int]]

    @classmethod
    def of(cls, layout: TagLayout, tokenizer: Any, names_domains: bool) -> Untagged:
        """`names_domains` puts ` SMILES` where `<SMILES>` stood, for every domain tag that is not absent."""
        there = [name for name, length in layout.lengths.items() if length and layout.kinds[name] == "domain"]
        domains = there if names_domains else []
        tokens = dict(zip(domains, tokens_of(tokenizer, [f" {name}" for name in domains]), strict=True))
        return cls(layout.vocabulary_size, {layout.ids(name).start: ids for name, ids in tokens.items()})

    def __call__(self, example: Example) -> Row:
        """
        Raises:
            UserError: nothing is left of the prompt.
        """
        upto = example.read_at + 1
        pieces = [self.names.get(i, [i] if i < self.vocabulary_size else []) for i in example.ids[:upto].tolist()]
        ids = np.array([*chain.from_iterable(pieces)], np.int64)
        if not len(ids):
            raise UserError(
                f"{example.origin}: nothing stands before the tag with the head, so a method without tags has no "
                "prompt to read. Put the tag behind a field in the template."
            )
        pools = np.repeat(example.pools[:upto], [len(piece) for piece in pieces])
        return Row(ids, pools, example.target)


def alike(rows: Sequence[Row], most: int, most_tokens: int) -> list[tuple[list[int], int]]:
    """Batches by the numbers of their rows, and with how many tokens all of a batch begin alike, as far as there are
    `most` rows and `most_tokens` with padding. Where that is less than half of the longest row, 0: such rows stand
    beside others of their length."""
    batches, others = list[tuple[list[int], int]](), list[int]()
    batch, shared, longest = list[int](), 0, 0
    for i in [*sorted(range(len(rows)), key=lambda i: rows[i].ids.tobytes()), -1]:
        if batch and i >= 0 and len(batch) < most:
            fewer = min(shared, _begin_alike(rows[batch[0]].ids, rows[i].ids), len(rows[i].ids) - 1)
            longer = max(longest, len(rows[i].ids))
            if 2 * fewer >= longer and longer * (len(batch) + 1) <= most_tokens:
                batch, shared, longest = [*batch, i], fewer, longer
                continue
        if len(batch) > 1:
            batches.append((batch, shared))
        else:
            others += batch
        if i >= 0:
            batch, shared, longest = [i], len(rows[i].ids) - 1, len(rows[i].ids)
    others.sort(key=lambda i: len(rows[i].ids))
    return batches + [(others[at : at + most], 0) for at in range(0, len(others), most)]


def _begin_alike(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def pad(rows: Sequence[Row]) -> Padded:
    longest = max(len(row.ids) for row in rows)
    ids_BS = np.zeros((len(rows), longest), np.int64)
    pools_BS = np.zeros((len(rows), longest), np.uint8)
    for b, row in enumerate(rows):
        ids_BS[b, : len(row.ids)], pools_BS[b, : len(row.ids)] = row.ids, row.pools
    last_B = np.array([len(row.ids) - 1 for row in rows])
    target_BK = np.stack([row.target for row in rows])
    return Padded(*map(torch.from_numpy, (ids_BS, pools_BS, last_B, target_BK)))
