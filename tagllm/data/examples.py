"""Examples on disk: written once for the rows, the prompt and the tokenizer they are made of, then memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tagllm.data.encode import Encoder, Example, Unusable
from tagllm.files import CACHE_ELSEWHERE, appearing, write_whole, writing

CACHED = 3
"""Raised where a mended fault changes the examples of rare rows: all are made anew, and runs still go on."""
CHUNK_ROWS = 1000


class _Batch(NamedTuple):
    """Rows as Arrow has them in memory, by the names of an `Example`: by way of Python's lists a protein of 1,000
    tokens takes ten times as long."""

    arrays: dict[str, tuple[np.ndarray, np.ndarray]]
    """Where each row begins, and the values of all rows behind each other."""
    numbers: dict[str, np.ndarray]
    origins: Any

    @classmethod
    def of(cls, batch: Any) -> _Batch:
        columns = {name: batch.column(name) for name in Example._fields}
        origins = columns.pop("origin")
        lists = {name: column for name, column in columns.items() if hasattr(column, "offsets")}
        arrays = {name: (column.offsets.to_numpy(), column.values.to_numpy()) for name, column in lists.items()}
        return cls(arrays, {name: columns[name].to_numpy() for name in columns.keys() - arrays.keys()}, origins)

    def example(self, row: int) -> Example:
        found: dict[str, Any] = {name: int(values[row]) for name, values in self.numbers.items()}
        found |= {name: values[starts[row] : starts[row + 1]].copy() for name, (starts, values) in self.arrays.items()}
        found["spans_at"] = found["spans_at"].reshape(-1, 2)
        return Example(**found, origin=self.origins[row].as_py())


class Examples:
    """The examples of one split of one source, memory-mapped."""

    def __init__(self, table: Any, rows: Any, source: int) -> None:
        self._table, self._rows, self.source = table, rows, source
        self._batches = [_Batch.of(batch) for batch in table.data.table.to_batches()]
        self._ends = np.cumsum([len(batch.origins) for batch in self._batches])
        # a column without [:] would be read row by row, which takes 20 times as long
        self.groups_n = np.array(table["group"][:], np.int64)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        row = range(len(self))[index]
        at = int(np.searchsorted(self._ends, row, side="right"))
        return self._batches[at].example(row - int(self._ends[at - 1]) if at else row)

    def home(self, index: int) -> int:
        """Rows with the same home, modulo the number of ranks, go to the same rank in every epoch."""
        group = int(self.groups_n[index])
        return group if group >= 0 else self.source + index

    def lengths(self) -> np.ndarray:
        """The tokens of each example."""
        return np.concatenate([np.diff(batch.arrays["ids"][0]) for batch in self._batches] or [np.zeros(0, int)])

    def row_numbers(self) -> list[int]:
        """Which row of the source each example is."""
        return list(self._table["row"][:])

    def origins(self) -> list[str]:
        """File and line of each example."""
        return list(self._table["origin"][:])

    def columns(self, names: Sequence[str], at: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """The values of all rows, or of those `at` these places, as they stand in the data."""
        numbers = self.row_numbers()
        rows = self._rows.select(numbers if at is None else [numbers[one] for one in at])
        return {name: rows[name][:] for name in names}

    def fields(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The values of rows with a target, as text."""
        with_target = [
            row for row, target in zip(self._table["row"][:], self._table["target"][:], strict=True) if len(target)
        ]
        rows = self._rows.select(with_target)
        return {name: ["" if value is None else str(value) for value in rows[name][:]] for name in names}

    def targets(self) -> np.ndarray:
        """(n, K) of rows with a target; empty without a head."""
        return np.array([row for row in self._table["target"][:] if len(row)], np.float32)


def cached_examples(
    cache: Path, digest: str, table: Any, indices: np.ndarray, encoder: Encoder, source: int
) -> tuple[Examples, dict[str, Any]]:
    """Those rows of `table`, and how many were cut or cannot be used; made where the cache has none of this `digest`.

    Raises:
        UserError: the cache cannot be written.
    """
    import datasets

    file = cache / f"examples-{CACHED}-{digest}.arrow"
    if not file.exists():
        _write(file, table, indices, encoder)
    report: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    return Examples(datasets.Dataset.from_file(str(file)), table, source), report


def _write(file: Path, table: Any, indices: np.ndarray, encoder: Encoder) -> None:
    """Examples as one Arrow file, and beside it a JSON of what was cut, unusable or wrong."""
    import pyarrow as pa

    lists = {"ids": pa.int32(), "marks": pa.uint8(), "pools": pa.uint8(), "target": pa.float32()}
    lists |= {"fields_at": pa.int32(), "spans_at": pa.int32()}
    numbers = ("head", "read_at", "function_at", "tokens_cut", "group", "alike_to", "row")
    columns = [*((k, pa.list_(v)) for k, v in lists.items()), *((k, pa.int64()) for k in numbers)]
    schema = pa.schema([*columns, ("origin", pa.string())])
    report: dict[str, Any] = {"bad_rows": [], "unlabelled": 0, "rows_cut": 0, "tokens_cut": 0}
    with writing(file.parent, CACHE_ELSEWHERE), appearing(file, first_stays=True) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for chunk in _encoded(table, indices, encoder, report):
                writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))
        write_whole(file.with_suffix(".json"), json.dumps(report).encode())  # first: who finds the rows needs it


def _encoded(
    table: Any, indices: np.ndarray, encoder: Encoder, report: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(indices), CHUNK_ROWS):
        chosen = indices[start : start + CHUNK_ROWS]
        rows = table.select(chosen).to_list()
        examples = []
        for index, row, result in zip(chosen, rows, encoder.encode(rows), strict=True):
            if isinstance(result, Unusable):
                if result.unlabelled:
                    report["unlabelled"] += 1
                else:
                    report["bad_rows"].append([row["_file"], row["_line"], result.reason])
                continue
            report["rows_cut"] += result.tokens_cut > 0
            report["tokens_cut"] += result.tokens_cut
            where = {"row": int(index), "origin": f"{row['_file']}, line {row['_line']}"}
            examples.append({**result._asdict(), "spans_at": result.spans_at.ravel(), **where})
        yield examples
