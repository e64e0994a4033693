"""Tag rows are the ids V, V+1, ... after the vocabulary, in the order of the layout; nothing is glued into the
tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from tagllm.config import HeadConfig
from tagllm.head import num_means, reads_of_fields


class TagLayout(NamedTuple):
    """Where the rows of each tag stand: frozen tags first, learned ones behind them.

    `heads` lists the function tags that own a head, in the order of their indices; `pools` are the means over fields
    that they read side by side, each with the number of the domain tag it is of, behind each of the `layers`, with
    lengths beside them or not.
    """

    vocabulary_size: int
    kinds: dict[str, str]
    lengths: dict[str, int]
    learned: tuple[str, ...]
    heads: dict[str, HeadConfig]
    pools: tuple[int, ...] = (0,)
    layers: tuple[int, ...] = ()
    reads_lengths: bool = False

    @classmethod
    def of(
        cls, vocabulary_size: int, kinds: Mapping[str, str], lengths: Mapping[str, int], learned: Iterable[str],
        heads: Mapping[str, HeadConfig], pools: tuple[int, ...] = (0,),
    ) -> TagLayout:  # fmt: skip
        learned = tuple(learned)
        order = [name for name in kinds if name not in learned] + list(learned)
        return cls(
            vocabulary_size, {name: kinds[name] for name in order}, {name: lengths[name] for name in order},
            learned, dict(heads), pools, *reads_of_fields(heads),
        )  # fmt: skip

    def ids(self, name: str) -> range:
        first = self.vocabulary_size
        for other, length in self.lengths.items():
            if other == name:
                return range(first, first + length)
            first += length
        raise KeyError(name)

    def by_learned_tag(self, rows_TD: Tensor | None) -> dict[str, Tensor]:
        """What belongs to each learned tag (its rows, their gradient) of all learned rows behind each other; a tag of
        no rows has nothing, and None stands for no rows at all."""
        names = [name for name in self.learned if self.lengths[name]]
        if rows_TD is None or not names:
            return {}
        return dict(zip(names, rows_TD.split([self.lengths[name] for name in names]), strict=True))

    @property
    def num_pools(self) -> int:
        return len(self.pools)

    @property
    def num_means(self) -> int:
        """Over the fields of a row: of each layer, and there of each pool."""
        return num_means(self.num_pools, self.layers)

    @property
    def first_learned_id(self) -> int:
        """Ids from here on are learned."""
        return self.vocabulary_size + sum(n for name, n in self.lengths.items() if name not in self.learned)
