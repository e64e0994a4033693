"""What a named data set is: where its rows come from, under which licence, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tagllm.config import Split
from tagllm.data.readers import read_rows
from tagllm.data.row import BadRow
from tagllm.errors import UserError

RecipeRow = tuple[Split | None, dict[str, Any]]
"""The split the data set itself gives the row (None: it gives none) and its values."""


class Recipe(NamedTuple):
    name: str
    description: str
    licence: str
    source: str
    """Where the rows come from, for people."""
    columns: dict[str, type]
    rows: Callable[[Path | None], Iterator[RecipeRow]]
    """Of what `--from` names; None: of the installed package or of the hub."""
    package: str = ""
    """The installed package the rows come from; another version of it may have other rows."""
    origin: str = ""
    """What `--from` must name; empty: nothing need be given."""
    format: int = 1
    """Raise when it would give other rows than before."""

    @property
    def is_packaged(self) -> bool:
        """An installed package has all its rows, and `--from` nothing to say."""
        return bool(self.package) and not self.origin


def pair_key(*parts: str) -> str:
    """A short key of the parts, the same on every machine."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def file_in(recipe: str, origin: Path | None, *names: str) -> Path:
    """The first of `names` in the folder `origin`, or `origin` itself if it has one of these names.

    Raises:
        UserError: there is none.
    """
    if origin is not None and origin.is_file() and origin.name in names:
        return origin
    for name in names:
        if origin is not None and (origin / name).is_file():
            return origin / name
    raise UserError(f"recipe {recipe}: {origin} holds no {' or '.join(names)}. Give the folder that does with --from.")


def whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """All rows of a data file.

    Raises:
        UserError: one cannot be read.
    """
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise UserError(f"{path}, line {row.line}: {row.reason}. Restore the file.")
        yield row.values
