"""Rows of one data file, read as a stream: csv, tsv, jsonl, parquet, fasta, smi, each also gzipped."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from tagllm.data.row import READ_UPTO, BadRow, Row, checked, checked_names, plain_values, undecoded
from tagllm.errors import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

MAX_FIELD_CHARACTERS = 10_000_000
OBJECTS_WITH_COLUMNS = 10_000
KINDS = {
    "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet",
    "fasta": "fasta", "fa": "fasta", "faa": "fasta", "smi": "smi",
}  # fmt: skip
FIXED_COLUMNS = {"fasta": ["id", "description", "sequence"], "smi": ["smiles", "name"]}
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a data file one by one; what cannot be read is a `BadRow`, and reading goes on after it.

    csv, tsv, fasta and smi give strings; jsonl and parquet keep numbers and booleans, and give nested values as JSON.

    Raises:
        UserError: unknown suffix, no such file, no header, no row at all, or a file cut off or damaged.
    """
    kind = kind_of(path)
    readers = {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "fasta": _fasta_rows, "smi": _smi_rows}
    num_rows = 0
    with _readable(path):
        rows = _csv_rows(path, kind) if kind in ("csv", "tsv") else readers[kind](path)
        for row in rows:
            num_rows += 1
            yield checked(row) if isinstance(row, Row) else row
    if not num_rows:
        raise UserError(f"{path}: holds no row; a data file must hold at least one. Check that it was written whole.")


def column_names(path: Path) -> list[str]:
    """The columns of a data file; of jsonl those that any of its first 10,000 objects has.

    Raises:
        UserError: as `read_rows`.
    """
    kind = kind_of(path)
    if kind in ("csv", "tsv"):
        with _readable(path), _open_text(path) as stream:
            header = _csv_header(_csv_reader(stream, kind), path)
            return [header[at] for at in _named(header)]
    if kind == "parquet":
        with _readable(path), _parquet(path) as parquet:
            return checked_names(parquet.schema_arrow.names, str(path))
    if kind == "jsonl":
        objects = (row.values for row in read_rows(path) if isinstance(row, Row))
        names = dict.fromkeys(itertools.chain.from_iterable(itertools.islice(objects, OBJECTS_WITH_COLUMNS)))
        if not names:
            raise UserError(f"{path}: no line is a JSON object with values; a .jsonl file has one per line. Give such.")
        return checked_names(names, str(path))
    next(read_rows(path))
    return list(FIXED_COLUMNS[kind])


def kind_of(path: Path) -> str:
    """Which reader a file needs, by its suffix; raises `UserError` for an unknown one and where there is no file."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix[1:] not in KINDS:
        raise UserError(
            f"{path}: cannot be read: suffix {suffix or 'none'!r}; known are {', '.join(KINDS)}, each also with .gz. "
            "Rename or convert it."
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; a path names one data file, seen from {Path.cwd()}. Check the spelling.")
    return KINDS[suffix[1:]]


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is no whole gzip file: {error}; it is cut off or damaged. Copy it again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}; it must be a readable file. Check it.") from None


def _open_text(path: Path) -> IO[str]:
    """`newline=""` leaves line ends inside quoted fields alone and still splits lines at all three kinds."""
    opener = gzip.open if _is_gzip(path) else open
    stream = opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return cast(IO[str], stream)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without the blank ones and without white space at either end."""
    with _open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if text := line.strip():
                yield number, text


def _csv_reader(stream: IO[str], kind: str) -> Any:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    return csv.reader(stream, delimiter="," if kind == "csv" else "\t", strict=True)


def _csv_header(reader: Any, path: Path) -> list[str]:
    rule = "line 1 must name the columns. Add a header line."
    try:
        names = next(([name.strip() for name in row] for row in reader if not _is_blank(row)), None)
    except csv.Error as error:
        raise UserError(f"{path}: line 1 cannot be read: {error}; {rule}") from None
    if names is None:
        raise UserError(f"{path}: is empty; {rule}")
    if len(names) > 1 and not any(names):
        raise UserError(f"{path}: line 1 holds {len(names)} empty names; {rule}")
    if any("\0" in name or undecoded(name) for name in names):
        raise UserError(f"{path}: line 1 is not UTF-8 text; data files must be. Convert it, as with iconv -t utf-8.")
    numbers = [name for name in names if NUMBER.fullmatch(name)]
    measured = [name for name in numbers if not name.isdigit()]  # a year may be a name, and 0.5 may not
    if measured or (numbers and len(numbers) == sum(map(bool, names))):
        raise UserError(f"{path}: has no header: line 1 holds the number {(measured or numbers)[0]}; {rule}")
    if len(names) == 1 and (other := re.search("[,;|\t]", names[0])):
        raise UserError(
            f"{path}: line 1 is one column, {names[0]!r}, with {other[0]!r} in it; columns stand between commas in a "
            ".csv and between tabs in a .tsv. Save it so, or rename it."
        )
    checked_names((names[at] for at in _named(names)), str(path))
    return names


def _named(names: Sequence[str]) -> list[int]:
    """Which columns there are: spreadsheets leave separators behind a header, so several without a name are none."""
    return [at for at, name in enumerate(names) if name or names.count("") == 1]


def _is_blank(row: list[str]) -> bool:
    """A line of white space; the quoted empty field of a table with one column is a row."""
    return not row or (len(row) == 1 and row[0].isspace())


def _csv_rows(path: Path, kind: str) -> Iterator[Row | BadRow]:
    with _open_text(path) as stream:
        reader = _csv_reader(stream, kind)
        names = _csv_header(reader, path)
        named = _named(names)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                upto = f" {READ_UPTO}{reader.line_num})" if reader.line_num > line else ""
                yield BadRow(line, f"{error}{upto}")
                continue
            if row is None:
                return
            if _is_blank(row):
                continue
            if len(named) < len(names):
                _refuse_nameless(row, names, f"{path}: line {line}")
            if len(row) == len(names):
                yield Row(line, {names[at]: row[at] for at in named})
            else:
                legible = checked(Row(line, {names[at]: row[at] for at in named if at < len(row)}))
                reason = f"{len(row)} columns where the header has {len(names)}"
                yield BadRow(line, reason, legible.values if isinstance(legible, Row) else None)


def _refuse_nameless(row: Sequence[str], names: Sequence[str], where: str) -> None:
    for at, (name, value) in enumerate(zip(names, row, strict=False), start=1):
        if not name and value.strip():
            raise UserError(
                f"{where} holds {value[:40]!a} in column {at}, which line 1 gives no name, and {names.count('')} have "
                "none; only an empty column may be without. Name it, or take it out."
            )


def _jsonl_rows(path: Path) -> Iterator[Row | BadRow]:
    for number, text in _lines(path):
        try:
            if undecoded(text):
                yield BadRow(number, "not valid UTF-8")
                continue
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield BadRow(number, f"not JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(number, plain_values(values))
        else:
            yield BadRow(number, f"a JSON {type(values).__name__}, not an object")


def _fasta_rows(path: Path) -> Iterator[Row | BadRow]:
    start, head, parts = 0, "", list[str]()
    for number, text in _lines(path):
        if text.startswith(">"):
            if start:
                yield _fasta_entry(start, head, parts)
            start, head, parts = number, text[1:].strip(), []
        elif start:
            parts += text.split()
        elif not parts:
            parts.append(text)
            yield BadRow(number, "text before the first >")
    if start:
        yield _fasta_entry(start, head, parts)


def _fasta_entry(line: int, head: str, parts: list[str]) -> Row | BadRow:
    name, description = _first_word(head)
    if not name or not parts:
        return BadRow(line, f"entry {name!a} without a sequence" if name else "entry without an id")
    return Row(line, {"id": name, "description": description, "sequence": "".join(parts)})


def _first_word(text: str) -> tuple[str, str]:
    """The first word and the rest, each possibly empty."""
    first, *rest = text.split(maxsplit=1) or [""]
    return first, rest[0] if rest else ""


def _smi_rows(path: Path) -> Iterator[Row | BadRow]:
    first = True
    for number, text in _lines(path):
        smiles, name = _first_word(text)
        if not (first and smiles.lower() == "smiles"):
            yield Row(number, {"smiles": smiles, "name": name})
        first = False


@contextmanager
def _parquet(path: Path) -> Iterator[ParquetFile]:
    """A gzipped one is unpacked to a temporary file: parquet is read from its end."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with tempfile.TemporaryFile() as unpacked:
        if _is_gzip(path):
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, unpacked)
        try:
            with ParquetFile(unpacked if _is_gzip(path) else path) as parquet:
                yield parquet
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: is no whole parquet file: {error}; cut off or damaged. Copy it again.") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: holds text that is not UTF-8: {error}; write it anew as UTF-8.") from None


def _parquet_rows(path: Path) -> Iterator[Row | BadRow]:
    with _parquet(path) as parquet:
        checked_names(parquet.schema_arrow.names, str(path))
        number = 0
        for batch in parquet.iter_batches(batch_size=1000):
            for number, values in enumerate(_shortest(batch).to_pylist(), start=number + 1):  # noqa: B020
                yield Row(number, plain_values(values))


def _shortest(batch: RecordBatch) -> RecordBatch:
    """Numbers of 32 bits as they would be written: .1 is not 0.10000000149011612."""
    import pyarrow as pa

    for at, field in enumerate(batch.schema):
        if field.type == pa.float32():
            column = batch.column(at).cast(pa.string()).cast(pa.float64())
            batch = batch.set_column(at, field.name, column)
    return batch
