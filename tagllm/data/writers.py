"""Writes rows to csv, tsv, jsonl or parquet, by suffix (also .gz for text). The file appears whole or not at all."""

from __future__ import annotations

import csv
import gzip
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tagllm.errors import UserError

KINDS = ("csv", "tsv", "jsonl", "parquet")


class Writer:
    """Takes rows one by one."""

    def __init__(self, stream: IO[Any], kind: str, columns: Sequence[str]) -> None:
        self._stream, self._kind, self._columns = stream, kind, columns
        self._rows: list[Mapping[str, Any]] = []
        if kind in ("csv", "tsv"):
            self._csv = csv.DictWriter(stream, columns, delimiter="," if kind == "csv" else "\t", lineterminator="\n")
            self._csv.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        if self._kind == "jsonl":
            self._stream.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
        elif self._kind == "parquet":
            self._rows.append(row)
        else:
            self._csv.writerow(row)

    def close(self) -> None:
        if self._kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = {name: [row.get(name) for row in self._rows] for name in self._columns}
            pq.write_table(pa.table(columns), self._stream)


def writable_kind(path: Path) -> str:
    """Raises UserError for a suffix that cannot be written."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix[1:]
    if kind not in KINDS:
        raise UserError(f"{path}: cannot be written: suffix {path.suffix!r}; known are {', '.join(KINDS)}. Rename it.")
    return kind


@contextmanager
def open_writer(path: Path, columns: Sequence[str]) -> Iterator[Writer]:
    """A writer whose file gets its name when everything is written."""
    kind = writable_kind(path)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open(temporary, kind, path.name.lower().endswith(".gz")) as stream:
            writer = Writer(stream, kind, columns)
            yield writer
            writer.close()
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}. Free space there, or name another file.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _open(path: Path, kind: str, packed: bool) -> IO[Any]:
    if kind == "parquet":
        return open(path, "wb")
    opener: Any = gzip.open if packed else open
    opened: IO[Any] = opener(path, "wt", encoding="utf-8", newline="")
    return opened
