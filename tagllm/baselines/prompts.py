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

from tagllm.data.encode import Example, TagLayout
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
        tokens = {name: tokenizer(f" {name}", add_special_tokens=False).input_ids for name in domains}
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


def pad(rows: Sequence[Row]) -> Padded:
    longest = max(len(row.ids) for row in rows)
    ids_BS = np.zeros((len(rows), longest), np.int64)
    pools_BS = np.zeros((len(rows), longest), np.uint8)
    for b, row in enumerate(rows):
        ids_BS[b, : len(row.ids)], pools_BS[b, : len(row.ids)] = row.ids, row.pools
    last_B = np.array([len(row.ids) - 1 for row in rows])
    target_BK = np.stack([row.target for row in rows])
    return Padded(*map(torch.from_numpy, (ids_BS, pools_BS, last_B, target_BK)))
