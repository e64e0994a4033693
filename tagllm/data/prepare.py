"""`tagllm prepare NAME`: the rows of a named data set, written once as parquet with what they were made from."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from tagllm import __version__
from tagllm.config import SPLITS, Split
from tagllm.data.recipes import RECIPES, Recipe, RecipeRow
from tagllm.errors import UserError
from tagllm.files import (
    CACHE_ELSEWHERE,
    DamagedFile,
    appearing_folder,
    json_bytes,
    read_json,
    sha256_file,
    write_durably,
    writing,
)

BATCH_ROWS = 10_000


class Prepared(NamedTuple):
    """A prepared data set: a file per split it gives, or one for all rows (under None)."""

    folder: Path
    files: dict[Split | None, Path]
    about: dict[str, Any]
    """`recipe.json`: licence, source, what it was made from, sha256 and rows of each file."""


def prepare(recipe: Recipe, origin: Path | None, cache: Path) -> Prepared:
    """Reads the rows from `origin`, or from where the recipe has them, and writes them to `cache/recipes/NAME`.

    Rows that were prepared from the same origin before are left as they are, unless they are damaged; without an origin
    so are those that were prepared from any.

    Raises:
        UserError: an origin that is missing, not as it must be or of no use; rows that cannot be read; a full disk;
            without an origin, rows that need one and were never prepared, or are damaged.
    """
    folder = cache / "recipes" / recipe.name
    if origin is not None:
        _check_origin(recipe, origin)
    elif _is_of_origin(recipe, folder):
        return _opened(folder)
    elif recipe.origin:
        old = " by this version" if (folder / "recipe.json").is_file() else ""
        raise UserError(
            f"recipe {recipe.name}: it is not prepared{old}, and its rows are in no package. "
            f"Run: tagllm prepare {recipe.name} --from PATH, where PATH is {recipe.origin}."
        )
    try:
        made_from = _identity(recipe, origin)
    except OSError as error:
        raise UserError(f"--from {origin}: cannot be read: {error}. Name the files of the recipe alone.") from None
    try:
        if read_json(folder / "recipe.json").get("made_from") == made_from:
            return _opened(folder)
    except DamagedFile:  # or not there; written anew below
        pass
    with writing(folder, CACHE_ELSEWHERE), appearing_folder(folder) as unfinished:
        counts = _write(recipe, origin, unfinished)
        about = {
            "name": recipe.name, "description": recipe.description, "licence": recipe.licence,
            "source": recipe.source, "made_from": made_from, "rows": counts, "columns": list(recipe.columns),
            "sha256": {f"{name}.parquet": sha256_file(unfinished / f"{name}.parquet") for name in counts},
            "tagllm": __version__, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        write_durably(unfinished / "recipe.json", json_bytes(about))
    return _opened(folder)


def describe(data: Prepared) -> list[str]:
    """For people: what it is, whose it is, and that it is whole."""
    about = data.about
    rows = ", ".join(f"{name} {about['rows'][name]:,}" for name in (*SPLITS, "all") if name in about["rows"])
    lines = [f"{about['name']}: {about['description']}", f"  from     {about['source']}"]
    lines += [f"  licence  {about['licence']}", f"  rows     {rows}", f"  columns  {', '.join(about['columns'])}"]
    return [*lines, *(f"  sha256   {digest}  {data.folder / name}" for name, digest in about["sha256"].items())]


def table_of(cache: Path) -> Table:
    """All named data sets, and which are prepared."""
    table = Table(title="named data sets (recipe: NAME)", title_justify="left")
    for title in ("name", "rows come from", "licence", "prepared"):
        table.add_column(title, no_wrap=title == "name", overflow="fold")
    for recipe in RECIPES.values():
        there = "yes" if _is_of_this_version(recipe, cache / "recipes" / recipe.name) else ""
        table.add_row(recipe.name, recipe.source, recipe.licence, there or ("with --from" if recipe.origin else ""))
    return table


def _check_origin(recipe: Recipe, origin: Path) -> None:
    if recipe.is_packaged:
        raise UserError(
            f"recipe {recipe.name}: --from {origin} would not be read: its rows are those of package {recipe.package}. "
            f"Run: tagllm prepare {recipe.name}."
        )
    if not origin.exists():
        raise UserError(f"--from {origin}: there is no such file or folder; it must be {recipe.origin or 'a copy'}.")


def _is_of_origin(recipe: Recipe, folder: Path) -> bool:
    """Prepared with --from, be it needed or a local copy of the hub's repository; such rows stay."""
    if recipe.is_packaged or not _is_of_this_version(recipe, folder):
        return False
    return bool(read_json(folder / "recipe.json")["made_from"].get("origin"))


def _is_of_this_version(recipe: Recipe, folder: Path) -> bool:
    file = folder / "recipe.json"
    return file.is_file() and read_json(file).get("made_from", {}).get("format") == recipe.format


def _opened(folder: Path) -> Prepared:
    about = read_json(folder / "recipe.json")
    for name, expected in about["sha256"].items():
        found = sha256_file(folder / name) if (folder / name).is_file() else "none"
        if found != expected:
            raise DamagedFile(folder / name, f"its sha256 is {found[:12]}, recipe.json says {expected[:12]}")
    files: dict[Split | None, Path] = {split: folder / f"{split}.parquet" for split in SPLITS if split in about["rows"]}
    return Prepared(folder, files or {None: folder / "all.parquet"}, about)


def _identity(recipe: Recipe, origin: Path | None) -> dict[str, Any]:
    """What the rows depend on: the version of a package, the contents of files."""
    found: dict[str, Any] = {"format": recipe.format}
    if recipe.package:
        try:
            found["package"] = f"{recipe.package} {metadata.version(recipe.package)}"
        except metadata.PackageNotFoundError:
            found["package"] = f"{recipe.package}, not installed"
    if origin is not None:
        files = [origin] if origin.is_file() else sorted(path for path in origin.rglob("*") if path.is_file())
        found["origin"] = {str(path.relative_to(origin.parent)): sha256_file(path) for path in files}
    return found


def _write(recipe: Recipe, origin: Path | None, folder: Path) -> dict[str, int]:
    """Numbers of rows by split, or of `all`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(column, types[kind]) for column, kind in recipe.columns.items()])
    writers: dict[str, Any] = {}
    counts: dict[str, int] = {}
    try:
        for name, rows in _batches(_checked(recipe, origin)):
            if name not in writers:
                writers[name] = pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd")
            writers[name].write_table(pa.Table.from_pylist(rows, schema=schema))
            counts[name] = counts.get(name, 0) + len(rows)
    finally:
        for writer in writers.values():
            writer.close()
    if not counts:
        raise UserError(f"recipe {recipe.name}: {origin or recipe.source} gave no row. Check that it is whole.")
    return counts


def _checked(recipe: Recipe, origin: Path | None) -> Iterator[RecipeRow]:
    """Its rows. Raises UserError where they cannot be made of what is read, or lack the value of a column."""
    num_good = 0
    try:
        for split, row in recipe.rows(origin):
            for column, kind in recipe.columns.items():
                if not isinstance(row.get(column), kind):
                    raise TypeError(f"{column} is {row.get(column)!r:.60}, not a {kind.__name__}")
            yield split, row
            num_good += 1
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # what a stranger's file does
        raise UserError(
            f"recipe {recipe.name}: {origin or recipe.source} is not of the form that is read: {error!r} behind "
            f"{num_good:,} good rows. It must be {recipe.origin or recipe.description}."
        ) from None


def _batches(rows: Iterator[RecipeRow]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of one split each, in their order."""
    for split, group in itertools.groupby(rows, key=lambda row: row[0]):
        values = (row for _, row in group)
        while chunk := list(itertools.islice(values, BATCH_ROWS)):
            yield split or "all", chunk
