"""Which row is in which split: a pure function of (seed, key), so no row ever moves when others are added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tagllm.config import SPLITS, FieldConfig, SourceConfig, Split
from tagllm.errors import UserError
from tagllm.template import Template, is_missing, unbroken

if TYPE_CHECKING:
    import datasets

Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def split_by(source: SourceConfig, template: Template) -> list[str]:
    """The columns whose text makes the key of a row: the given ones, a recipe's own `key`, or all fields of the
    template, by name, so that prompts that have them in another order hold out the same rows."""
    return source.split.by or (["key"] if source.recipe is not None else sorted(template.fields))


def keys_of(table: datasets.Dataset, by: Sequence[str], fields: Mapping[str, FieldConfig] = {}) -> list[str]:
    """The key of each row. White space at the ends of a value makes no other key: tables from spreadsheets have it.
    Nor does any in a value whose prompt has none, by the settings of `fields`."""
    about = [fields.get(name, FieldConfig()) for name in by]
    return [
        "\0".join("" if v is None else unbroken(str(v).strip(), of) for v, of in zip(row, about, strict=True))
        for row in _rows_of(table, by)
    ]


def refuse_keyless(table: datasets.Dataset, source: SourceConfig, template: Template, where: str) -> None:
    """Raises UserError where rows have no value in any of the columns that the config splits by: they would be one
    group, all of it in one split. Without a field of their prompt they cannot be used anyway."""
    by = source.split.by
    if not by or not {*by}.isdisjoint(template.fields):
        return
    empty = [all(is_missing(value) or not str(value).strip() for value in row) for row in _rows_of(table, by)]
    missing = [at for at, bad in enumerate(table["_bad"][:]) if empty[at] and not bad]
    if missing:
        first = table[missing[0]]
        raise UserError(
            f"{where}: {len(missing):,} of {len(table):,} rows have no {' and no '.join(by)} to be split by, the first "
            f"{first['_file']}, line {first['_line']}; they would be one group in one split. Fill it in, "
            "take these rows out, or name another column in split.by."
        )


def _rows_of(table: datasets.Dataset, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name][:] for name in columns), strict=True)


def split_rows(
    table: datasets.Dataset, keys: Sequence[str], source: SourceConfig, where: str, wanted: Sequence[Split] = SPLITS
) -> dict[Split, Indices]:
    """Row indices per split, ascending; rows with a `_bad` reason are in none.

    A source that gives splits (`_split`) keeps them; a split it does not give is carved out of its train rows by
    the hash of the key with the share of the config. `source.rows` keeps the rows with the smallest hashes, so
    the same ones in every run, whatever stands first in the file; rows that share a key are told apart by their
    order among themselves.

    Args:
        table: has the columns `_file`, `_line`, `_split`, `_bad` of `sources.load_rows`.
        keys: one per row of the table; those of bad rows are not looked at.
        where: begins each error line.
        wanted: splits that may not be empty.

    Raises:
        UserError: a key is in two given splits; a split that was asked for has no rows.
    """
    valid, test = source.split.valid, source.split.test
    marks = table.select_columns(["_split", "_bad"]).with_format("arrow")[:]
    rows = np.flatnonzero(_strings(marks["_bad"]) == "").astype(np.int64)
    given = _strings(marks["_split"])[rows]
    split_hash, rank_hash = _hashes([keys[row] for row in rows.tolist()], source.split.seed)
    number = _splits_of(_uniform(split_hash), valid, test)
    givers = [split for split in SPLITS if bool((given == split).any())]
    if givers:
        kept = [SPLITS.index(split) for split in givers if split != "train"]
        number[np.isin(number, kept)] = SPLITS.index("train")
        for at in kept:
            number[given == SPLITS[at]] = at
        _refuse_overlap(table, keys, rows, np.where(given == "", "train", given), where)
    ranks = _rank(rank_hash) if source.rows else rank_hash
    found: dict[Split, Indices] = {}
    for at, split in enumerate(SPLITS):
        members = np.flatnonzero(number == at)
        if split in source.rows:
            members = members[np.argsort(ranks[members], kind="stable")[: source.rows[split]]]
        found[split] = np.sort(rows[members])
    _refuse_empty({split: found[split] for split in wanted}, source, table, where)
    return found


def answers_in(table: datasets.Dataset, source: SourceConfig, template: Template) -> list[str]:
    """What each row is to teach: its targets and its output, as they stand in the data."""
    columns = [*source.target, *([source.output] if template.has_output else [])]
    return keys_of(table, columns) if columns else [""] * len(table)


def split_record(
    splits: Mapping[Split, Indices], keys: Sequence[str], answers: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`{"train": {"n": 90, "sha256": "...", "answers": "..."}, ...}` for JSON: digests of the keys, and of what stands
    behind each. Neither depends on the order of the rows."""
    return {
        split: {
            "n": len(rows),
            "sha256": _digest(keys[row] for row in rows.tolist()),
            "answers": _digest(f"{keys[row]}\0{answers[row]}" for row in rows.tolist()),
        }
        for split, rows in splits.items()
    }


def _hashes(keys: Iterable[str], seed: int) -> tuple[Hashes, Hashes]:
    """Two independent 64-bit hashes per key: one says the split, the other the order in which `rows` keeps."""
    head = hashlib.blake2b(f"{seed}\0".encode(), digest_size=16)
    digests = bytearray()
    for key in keys:
        hasher = head.copy()
        hasher.update(key.encode())
        digests += hasher.digest()
    pairs = np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _uniform(hashes: Hashes) -> NDArray[np.float64]:
    """[0, 1) from the upper 53 bits, what a float64 holds exactly."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splits_of(uniform: NDArray[np.float64], valid: float, test: float) -> NDArray[np.int64]:
    """Indices into SPLITS. The line [0, 1) is drawn so that changing one share never moves a key between the others:

    0 |-- test --|-------- train --------|-- valid --| 1
    """
    return np.select([uniform < test, uniform >= 1 - valid], [SPLITS.index("test"), SPLITS.index("valid")], 0)


def _rank(hashes: Hashes) -> Hashes:
    """Gives the second, third ... row of a key a place of its own.

    Ranked by the key alone, `rows: {valid: 64}` of a table with 68 rows per protein would be one single protein.
    The mixing is splitmix64's (Steele et al. 2014).
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else order
    nth = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    mixed = np.empty_like(hashes)
    mixed[order] = ordered + nth.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _strings(column: Any) -> NDArray[np.str_]:
    """An Arrow column of short strings; long ones are cut, which keeps them different from the short."""
    import pyarrow.compute as pc

    return np.array(pc.utf8_slice_codeunits(column, 0, 8).to_pylist(), dtype="U8")


def _refuse_overlap(
    table: datasets.Dataset, keys: Sequence[str], rows: Indices, given: NDArray[np.str_], where: str
) -> None:
    first: dict[str, int] = {}
    overlaps: dict[str, tuple[int, int]] = {}
    for at, row in enumerate(rows.tolist()):
        other = first.setdefault(keys[row], at)
        if given[other] != given[at]:
            overlaps.setdefault(keys[row], (other, at))
    if overlaps:
        key, (one, two) = next(iter(overlaps.items()))
        places = [
            f"{given[at]} ({table[int(rows[at])]['_file']}, line {table[int(rows[at])]['_line']})" for at in (one, two)
        ]
        short = key if len(key) <= 60 else f"{key[:57]}..."
        raise UserError(
            f"{where}: key {short!r} is in two splits, {places[0]} and {places[1]}; {len(overlaps)} keys are in more "
            "than one; a held-out key may not be trained on. Take them out of one file, give all rows as one path, "
            "or name the columns that make a row unique in split.by."
        )


def _refuse_empty(found: Mapping[Split, Indices], source: SourceConfig, table: datasets.Dataset, where: str) -> None:
    share = source.split.share
    empty = [split for split in found if not len(found[split]) and (share(split) > 0 or split in source.rows)]
    if empty:
        counts = ", ".join(f"{split} {len(rows)}" for split, rows in found.items())
        bad = [at for at, reason in enumerate(table["_bad"][:]) if reason]
        first = table[bad[0]] if bad else {}
        unreadable = f"{len(bad)} (first: {first['_file']}, line {first['_line']}: {first['_bad']})" if bad else "0"
        raise UserError(
            f"{where}: no rows for {' and '.join(empty)}: {counts}, unreadable {unreadable}; a split that is asked "
            f"for must have one (split.valid is {share('valid'):g}, split.test is {share('test'):g}). Give more rows, "
            "change the share, or set it to 0 for no such split."
        )


def _digest(keys: Iterable[str]) -> str:
    hasher = hashlib.sha256()
    for key in sorted(key.encode() for key in keys):
        hasher.update(b"%d:" % len(key) + key)
    return hasher.hexdigest()
