"""Writes rows to csv, tsv, jsonl or parquet, by suffix (also .gz for text). The file appears whole or not at all."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from tagllm.errors import UserError
from tagllm.files import appearing, writing

KINDS = ("csv", "tsv", "jsonl", "parquet")


class Writer:
    """Takes rows one by one. A column that `columns` lacks stands behind them, empty in the rows that have none."""

    def __init__(self, stream: IO[Any], kind: str, columns: Sequence[str], spool: IO[str]) -> None:
        self._stream, self._kind, self._columns = stream, kind, dict.fromkeys(columns)
        self._lines = stream if kind == "jsonl" else spool  # all columns are known behind the last row
        self._quoting: Any = csv.QUOTE_MINIMAL

    def write(self, row: Mapping[str, Any]) -> None:
        self._columns.update(dict.fromkeys(row))
        if any(isinstance(value, str) and "\r" in value for value in row.values()):
            self._quoting = csv.QUOTE_ALL  # before Python 3.13 it would else stand without quotes, and end a line
        self._lines.write(json.dumps(dict(row), ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._kind == "jsonl":
            return
        self._lines.seek(0)
        rows = map(json.loads, self._lines)
        if self._kind == "parquet":
            _write_parquet(list(rows), list(self._columns), self._stream)
        else:
            delimiter = "," if self._kind == "csv" else "\t"
            table = csv.DictWriter(
                self._stream, list(self._columns), delimiter=delimiter, lineterminator="\n", quoting=self._quoting
            )
            table.writeheader()
            table.writerows(rows)


def _write_parquet(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], stream: IO[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: _array([row.get(name) for row in rows]) for name in columns}), stream)


def _array(values: list[Any]) -> Any:
    """As one Arrow type, or where there is none that holds them all, as text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 or kinds == {int, float}:
        with suppress(pa.ArrowException, OverflowError):  # an integer may be too large
            return pa.array(values)
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())


def numbered(name: str, number: int) -> list[str]:
    """Names of so many columns of one kind."""
    return [name] if number == 1 else [f"{name}_{k + 1}" for k in range(number)]


def writable_kind(path: Path) -> str:
    """Raises UserError for a suffix that cannot be written."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix[1:]
    if kind == "parquet" and path.name.lower().endswith(".gz"):
        raise UserError(f"{path}: cannot be written: parquet is packed by itself. Leave .gz out.")
    if kind not in KINDS:
        raise UserError(f"{path}: cannot be written: suffix {path.suffix!r}; known are {', '.join(KINDS)}. Rename it.")
    return kind


@contextmanager
def open_writer(path: Path, columns: Sequence[str]) -> Iterator[Writer]:
    """A writer whose file gets its name when everything is written."""
    kind = writable_kind(path)
    packed = path.name.lower().endswith(".gz")
    with writing(path, "Make room there, or name another file."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            appearing(path) as file, _open(file, kind, packed) as stream,
            TemporaryFile("w+", encoding="utf-8", dir=path.parent) as spool,
        ):  # fmt: skip
            writer = Writer(stream, kind, columns, spool)
            yield writer
            writer.close()


def _open(path: Path, kind: str, packed: bool) -> IO[Any]:
    if kind == "parquet":
        return open(path, "wb")
    opener: Any = gzip.open if packed else open
    opened: IO[Any] = opener(path, "wt", encoding="utf-8", newline="")
    return opened
