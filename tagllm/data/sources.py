"""Rows of files, recipes and hub data sets, read as a stream and kept as one memory-mapped Arrow file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tagllm.config import SPLITS, RowsConfig, Split, digest_of
from tagllm.data.prepare import prepare
from tagllm.data.readers import column_names, kind_of, read_rows
from tagllm.data.recipes import recipe_of
from tagllm.data.recipes.hub import load_hub
from tagllm.data.row import OWN_COLUMNS, BadRow, Row, checked, checked_names, plain_values
from tagllm.errors import UserError
from tagllm.files import CACHE_ELSEWHERE, appearing, sha256_file, writing

if TYPE_CHECKING:
    import datasets

FORMAT = 1
"""Raise when the same source would give other rows or columns than before: it makes old caches unused."""
BATCH_ROWS, BATCH_CHARACTERS = 2_000, 2**26
HUB_SPLITS: dict[str, Split] = {
    "train": "train", "validation": "valid", "valid": "valid", "val": "valid", "dev": "valid", "test": "test",
}  # fmt: skip


class SourceRows(NamedTuple):
    name: str
    """Begins error lines: the path(s), `recipe NAME` or `hub NAME`."""
    table: datasets.Dataset
    """`columns` and `_file`, `_line`, `_split` ("" if the source gives none), `_bad` (the reason a row could not be
    read, its `columns` are then None; else "")."""
    columns: list[str]
    given_splits: list[Split]
    num_bad: int

    @property
    def file(self) -> str:
        """Of the cache; its name is a digest of the contents."""
        return Path(self.table.cache_files[0]["filename"]).name


class _Part(NamedTuple):
    """A file, a split of a hub data set, or a recipe."""

    types: dict[str, type] | None
    """None: they are found by reading all rows once."""
    rows: Callable[[], Iterator[tuple[Split | None, Row | BadRow]]]
    file: str


def load_rows(source: RowsConfig, cache: Path) -> SourceRows:
    """All rows of a source as a memory-mapped table, written once to `cache/rows-<sha256>.arrow`.

    The digest is over the contents and names of the files, the prepared files of the recipe, or the name of
    the hub data set (which is loaded only if its rows are not in the cache). Several processes may call this at once:
    each writes under a name of its own and the first rename counts.

    Raises:
        UserError: the source cannot be read, files of one source differ in columns, or the cache cannot be written.
    """
    name, identity, parts_of = _origin(source, cache)
    file = cache / f"rows-{digest_of([FORMAT, identity])}.arrow"
    if not file.exists():
        _write(name, parts_of(), file)
    import datasets
    import pyarrow.compute as pc

    table = datasets.Dataset.from_file(str(file))
    splits = set(pc.unique(table.data.column("_split")).to_pylist())
    return SourceRows(
        name=name,
        table=table,
        columns=[column for column in table.column_names if column not in OWN_COLUMNS],
        given_splits=[split for split in SPLITS if split in splits],
        num_bad=pc.sum(pc.not_equal(table.data.column("_bad"), "")).as_py(),
    )


def _origin(source: RowsConfig, cache: Path) -> tuple[str, list[Any], Callable[[], list[_Part]]]:
    """Name, what identifies the rows, and the parts (made only when they are to be read)."""
    if source.recipe is not None:
        recipe = recipe_of(source.recipe)
        ready = prepare(recipe, None, cache)
        name = f"recipe {recipe.name}"
        parts = [_Part(recipe.columns, partial(_split_rows, file, split), name) for split, file in ready.files.items()]
        return name, ["recipe", recipe.name, ready.about["sha256"]], lambda: parts
    if source.hub is not None:
        hub = source.hub
        if Path(hub).exists():
            raise UserError(
                f"hub {hub}: is a folder or file here, and rows of a hub data set are kept under its name though files "
                "may change. Give its files with `path:`."
            )
        return f"hub {hub}", ["hub", hub], lambda: _hub_parts(hub)
    files = source.paths.items()  # as they are written, which a run is known by
    identity = ["path", *([split, path, kind_of(Path(path)), _sha256(Path(path))] for split, path in files)]
    return ", ".join(source.paths.values()), identity, lambda: [_file_part(Path(p), split) for split, p in files]


def _file_part(path: Path, split: Split | None) -> _Part:
    strings = kind_of(path) not in ("jsonl", "parquet")
    types: dict[str, type] | None = dict.fromkeys(column_names(path), str) if strings else None
    return _Part(types, partial(_split_rows, path, split), str(path))


def _split_rows(path: Path, split: Split | None) -> Iterator[tuple[Split | None, Row | BadRow]]:
    return ((split, row) for row in read_rows(path))


def _hub_parts(hub: str) -> list[_Part]:
    name, _, config = hub.partition(":")
    loaded = load_hub(name, config or None)
    known = {theirs: split for theirs, split in HUB_SPLITS.items() if theirs in loaded}
    if not known:
        raise UserError(
            f"hub {hub}: has the splits {', '.join(loaded)}; known are {', '.join(HUB_SPLITS)}. Save the rows you want "
            "to a file and give it with `path:`."
        )

    def part(theirs: str, split: Split) -> _Part:
        def rows() -> Iterator[tuple[Split | None, Row | BadRow]]:
            line = 0
            for batch in loaded[theirs].with_format("arrow").iter(1000):
                for line, values in enumerate(batch.flatten().to_pylist(), start=line + 1):  # noqa: B020
                    yield split, checked(Row(line, plain_values(values)))

        return _Part(None, rows, f"hub {hub} ({theirs})")

    return [part(theirs, split) for theirs, split in known.items()]


def _write(name: str, parts: list[_Part], file: Path) -> None:
    import pyarrow as pa

    types = _types(name, parts)
    arrow = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    schema = pa.schema([(column, arrow[kind]) for column, kind in {**types, **OWN_COLUMNS}.items()])
    with writing(file.parent, CACHE_ELSEWHERE):  # reading has its own errors
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            appearing(file, first_stays=True) as unfinished,
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            for columns in _batches(parts, types):
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))


def _batches(parts: list[_Part], types: dict[str, type]) -> Iterator[dict[str, list[Any]]]:
    columns: dict[str, list[Any]] = {column: [] for column in {**types, **OWN_COLUMNS}}
    characters = 0
    for part in parts:
        for split, row in part.rows():
            values = row.values if isinstance(row, Row) else {}
            bad = row.reason if isinstance(row, BadRow) else ""
            for column, kind in types.items():
                value = _as(kind, values.get(column))
                characters += len(value) if isinstance(value, str) else 0
                columns[column].append(value)
            own = {"_file": part.file, "_line": row.line, "_split": split or "", "_bad": bad}
            for column, value in own.items():
                columns[column].append(value)
            if len(columns["_bad"]) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield columns
                columns, characters = {column: [] for column in columns}, 0
    if columns["_bad"]:
        yield columns


def _types(name: str, parts: list[_Part]) -> dict[str, type]:
    """One type per column for all parts: the numbers of a column stay numbers if all its values are."""
    declared = [part for part in parts if part.types is not None]
    for part in declared[1:]:
        one, two = declared[0].types or {}, part.types or {}
        if set(one) != set(two):
            raise UserError(
                f"{name}: {part.file} has the columns {', '.join(two)}, but {declared[0].file} has {', '.join(one)}; "
                "the files of one source must have the same. Add or drop the others."
            )
    kinds: dict[str, set[type]] = {}
    for part in parts:
        if part.types is not None:
            for column, kind in part.types.items():
                kinds.setdefault(column, set()).add(kind)
            continue
        for _, row in part.rows():
            for column, value in (row.values if isinstance(row, Row) else {}).items():
                seen = kinds.setdefault(column, set())
                if value is not None:
                    seen.add(type(value) if not isinstance(value, int) or -(2**63) <= value < 2**63 else str)
    checked_names(kinds, name)
    return {column: _common(seen) for column, seen in kinds.items()}


def _common(kinds: set[type]) -> type:
    if len(kinds) == 1:
        return next(iter(kinds))
    return float if kinds == {int, float} else str


def _as(kind: type, value: Any) -> Any:
    if value is None or isinstance(value, kind):
        return value
    return float(value) if kind is float else json.dumps(value)


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}; it must be a readable file. Check it.") from None
