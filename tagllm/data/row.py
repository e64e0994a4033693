"""A row of data, whatever it is read from, and what its names and texts may hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from tagllm.errors import UserError

OWN_COLUMNS = {"_file": str, "_line": int, "_split": str, "_bad": str}
"""What `sources.load_rows` adds to the columns of the data, so no data file may have them."""


class Row(NamedTuple):
    line: int
    """1-based line where the row starts; of parquet, hub and recipe rows the 1-based number of the record."""
    values: dict[str, Any]


READ_UPTO = "(read up to line "
"""In the reason of a bad row that took others with it; cached tables keep nothing else of it."""


class BadRow(NamedTuple):
    """`values`: what can be read of it all the same. `illegible`: columns whose text cannot be read, where nothing else
    is wrong."""

    line: int
    reason: str
    values: dict[str, Any] | None = None
    illegible: tuple[str, ...] = ()


def lost_rows(file: str, line: int, reason: str) -> str:
    """What to tell of a row whose quote is not closed: no row behind it can be trusted. Empty for another row."""
    if READ_UPTO not in reason:
        return ""
    return (
        f"{file}, line {line}: {reason}; a quote that is not closed takes the rows behind it with it. Close it, or "
        "double it where it is meant."
    )


def checked(row: Row) -> Row | BadRow:
    """The row, or what is wrong with its text: a NUL byte, or bytes that are no UTF-8 (kept as lone surrogates)."""
    found = {column: fault for column, value in row.values.items() if (fault := _fault(column) or _fault(value))}
    if not found:
        return row
    first, fault = next(iter(found.items()))
    legible = {column: None if column in found else value for column, value in row.values.items() if not _fault(column)}
    return BadRow(row.line, f"column {first!a} {fault}", legible, tuple(found))


def _fault(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    return "holds a NUL byte" if "\0" in value else "is not valid UTF-8" if undecoded(value) else ""


def checked_names(names: Iterable[str], where: str) -> list[str]:
    """The names as a list; raises `UserError` for one that is there twice or that `load_rows` needs itself."""
    listed = list(names)
    for name in listed:
        if listed.count(name) > 1:
            raise UserError(f"{where}: column {name!r} is there {listed.count(name)} times; names must differ. Rename.")
        if name in OWN_COLUMNS:
            raise UserError(f"{where}: column {name!r} is reserved for where a row comes from. Rename it.")
    return listed


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Scalars as they are, bytes as UTF-8, lists and mappings as JSON, dates and decimals as their text."""
    return {column: _plain(value) for column, value in values.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, bytes):  # text of writers that do not mark it as such
        return value.decode("utf-8", "surrogateescape")
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)


def undecoded(text: str) -> bool:
    """Whether bytes that are no UTF-8 are in it (read with `surrogateescape`)."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None
