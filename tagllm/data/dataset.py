"""From a config to examples on disk: read, split by key, tokenise once, memory-map.

Everything made here is cached under digests of what it was made from, so a second run starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tagllm.config import SPLITS, DataConfig, SourceConfig, Split, digest_of
from tagllm.data.encode import Encoder
from tagllm.data.examples import Examples, cached_examples
from tagllm.data.layout import TagLayout
from tagllm.data.overlap import check_keys, drawn_from
from tagllm.data.pieces import lead_of
from tagllm.data.readers import kind_of
from tagllm.data.row import READ_UPTO, lost_rows
from tagllm.data.sources import SourceRows, load_rows
from tagllm.data.splits import answers_in, keys_of, refuse_keyless, split_by, split_record, split_rows
from tagllm.errors import SharedError, UserError, did_you_mean
from tagllm.template import Template

FORMAT = 6
"""What a checkpoint of the same data must agree on."""
_LISTED_ERRORS = 5
_MISSING = ["NA", "NaN", "NULL", "None"]


class RejectedRow(NamedTuple):
    file: str
    line: int
    reason: str


class Data(NamedTuple):
    """All splits of all sources, and what there is to report about them."""

    splits: dict[Split, list[Examples]]
    record: dict[str, Any]
    bad_rows: list[RejectedRow]
    doubts: tuple[str, ...] = ()
    """What stands in the data and may not be meant, in a line for each source; nothing depends on it."""

    @property
    def digest(self) -> str:
        return digest_of(self.record)

    def told(self) -> list[str]:
        """What is not asked as it stands in the data, in a line for each source, and how many rows are left out."""
        lines = [*self.doubts]
        for at, about in self.record.items():
            splits = [about[split] for split in SPLITS if split in about]
            found = {
                "left out by max_characters": about["left_out_by_max_characters"],
                "without room for the answer": sum(split["unlabelled"] for split in splits),
                "cut to the tokens there is room for": sum(split["rows_cut"] for split in splits),
            }
            if counts := ", ".join(f"{count:,} {what}" for what, count in found.items() if count):
                lines.append(f"data.sources.{at} ({about['name']}): of {about['rows']:,} rows {counts}")
        if self.bad_rows:
            file, line, reason = self.bad_rows[0]
            told = f"{len(self.bad_rows):,} rows cannot be used (the run's bad_rows.jsonl has all)"
            lines.append(f"{told}, the first {file}, line {line}: {reason}")
        return lines


class Prompts(NamedTuple):
    """What turns rows into ids, the same for all sources of a run."""

    layout: TagLayout
    tokenizer: Any
    max_tokens: int

    @classmethod
    def of(cls, layout: TagLayout, tokenizer: Any, wanted: int | None, longest: int) -> Prompts:
        """Of as many tokens as the config wants (`data.max_tokens`; None: as the backbone takes, `longest`).

        Raises:
            UserError: the backbone takes fewer.
        """
        if wanted is not None and wanted > longest:
            raise SharedError(f"data.max_tokens is {wanted}; the backbone takes at most {longest}. Lower it.")
        return cls(layout, tokenizer, wanted or longest)

    def digest(self) -> str:
        layout = self.layout._asdict() | {"heads": {n: h.model_dump(mode="json") for n, h in self.layout.heads.items()}}
        ordered = [[*value.items()] if isinstance(value, dict) else value for value in layout.values()]  # ids follow it
        ends = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id  # tokenizer.json does not say which these are
        return digest_of([FORMAT, ordered, tokenizer_digest(self.tokenizer), ends, self.max_tokens])


@lru_cache(maxsize=8)
def tokenizer_digest(tokenizer: Any) -> str:
    """Computed once for each tokenizer: every checkpoint names it, and writing its vocabulary out takes 0.1 s."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    lead = lead_of(tokenizer)
    return digest_of([found, lead] if lead else found)


def tokenise(
    config: DataConfig,
    templates: Sequence[Template],
    prompts: Prompts,
    cache: Path,
    wanted: Sequence[Split] = SPLITS,
) -> Data:
    """Reads and splits every source, and tokenises the splits that are wanted.

    Raises:
        UserError: unreadable rows (unless `on_bad_row: skip`), a quote that is not closed, a missing column, an empty
            split, overlapping splits, or more rows without a label than `max_unlabelled_share`; other keys of the same
            rows (`check_keys`).
    """
    splits: dict[Split, list[Examples]] = {split: [] for split in wanted}
    record: dict[str, Any] = {}
    bad_rows: list[RejectedRow] = []
    doubts: list[str] = []
    for at, (source, template, (rows, table, found, of_splits)) in enumerate(
        zip(config.sources, templates, _divided(config, templates, cache, wanted), strict=True)
    ):
        where = f"data.sources.{at}"
        bad_rows += [
            RejectedRow(row["_file"], row["_line"], row["_bad"])
            for row in (table.filter(lambda bad: bad != "", input_columns="_bad") if rows.num_bad else [])
        ]
        doubts += _missing_in_words(source, template, rows, f"{where} ({rows.name})")
        encoder = Encoder(template, source, prompts.layout, prompts.tokenizer, prompts.max_tokens)
        stem = [
            digest_of([source.model_dump(exclude={"weight", "rows_per_group"}), prompts.digest()]),
            of_splits,
        ]
        record[str(at)] = {
            "name": rows.name, "rows": len(rows.table), "left_out_by_max_characters": len(rows.table) - len(table),
            "splits": of_splits, "held_out": drawn_from(source, split_by(source, template), rows.given_splits),
        }  # fmt: skip
        for split in wanted:
            digest = digest_of([*stem, split, rows.file])
            examples, report = cached_examples(cache, digest, table, found[split], encoder, at)
            bad_rows += [RejectedRow(*row) for row in report["bad_rows"]]
            record[str(at)][split] = {"examples": len(examples), "sha256": digest} | {
                key: report[key] for key in ("unlabelled", "rows_cut", "tokens_cut")
            }
            _refuse_unlabelled(config, report, len(examples), f"{where} ({rows.name}), {split}")
            splits[split].append(examples)
    if bad_rows and config.on_bad_row == "error":
        _refuse(bad_rows)
    return Data(splits, record, bad_rows, tuple(doubts))


class _Divided(NamedTuple):
    """The rows of a source and of them those short enough, with the indices and the record of each split."""

    rows: SourceRows
    table: Any
    found: dict[Split, np.ndarray]
    record: dict[str, dict[str, Any]]


def _divided(
    config: DataConfig, templates: Sequence[Template], cache: Path, wanted: Sequence[Split]
) -> Iterator[_Divided]:
    """Each source, after all of them were checked against each other."""
    loaded = [load_rows(source, cache) for source in config.sources]
    for rows in loaded:
        _refuse_lost(rows)
    check_keys(config.sources, templates, [rows.given_splits for rows in loaded])
    for at, (source, template, rows) in enumerate(zip(config.sources, templates, loaded, strict=True)):
        where = f"data.sources.{at} ({rows.name})"
        check_columns(source, template, rows.columns, where)
        table = rows.table.select(_short_enough(rows.table, source))
        refuse_keyless(table, source, template, where)
        keys = keys_of(table, split_by(source, template), source.fields)
        found = split_rows(table, keys, source, where, wanted)
        yield _Divided(rows, table, found, split_record(found, keys, answers_in(table, source, template)))


def _refuse_lost(rows: SourceRows) -> None:
    """Raises UserError where a quote that is not closed hides rows, which leaving one out would not tell."""
    import pyarrow.compute as pc

    marks = pc.match_substring(rows.table.data.column("_bad"), READ_UPTO)
    for row in rows.table.select(np.flatnonzero(marks)[:1]):
        raise UserError(lost_rows(row["_file"], row["_line"], row["_bad"]))


def split_records(config: DataConfig, templates: Sequence[Template], cache: Path) -> dict[str, dict[str, Any]]:
    """What results keep of the rows of each source: the record of its splits, as the data is now."""
    return {str(at): of.record for at, of in enumerate(_divided(config, templates, cache, SPLITS))}


def check_columns(source: SourceConfig, template: Template, columns: Sequence[str], where: str) -> None:
    """Raises UserError for every column that the template, the target, the key or a filter needs and is not there."""
    output = [source.output] if template.has_output else []
    needed = dict.fromkeys(
        [*template.fields, *output, *source.target, *source.split.by, *source.group_by, *source.max_characters]
    )
    problems = [
        f"{where}: there is no column {name!r}. {did_you_mean(name, columns)}" for name in needed if name not in columns
    ]
    if problems:
        raise UserError(*problems)


def _missing_in_words(source: SourceConfig, template: Template, rows: SourceRows, where: str) -> list[str]:
    """A line where fields of a csv or tsv hold what R and pandas write for no value: it stands in prompts as text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not source.paths or any(kind_of(Path(path)) not in ("csv", "tsv") for path in source.paths.values()):
        return []
    found = []
    for name in template.fields:
        marked = np.flatnonzero(pc.is_in(rows.table.data.column(name), pa.array(_MISSING)))
        if len(marked):
            first = rows.table[int(marked[0])]
            place = f"{first['_file']}, line {first['_line']}"
            found.append(f"{name} is {first[name]} in {len(marked):,} rows (first: {place})")
    told = f"{where}: {', '.join(found)}, which prompts have as text; leave a cell empty to leave its row out"
    return [told] if found else []


def _short_enough(table: Any, source: SourceConfig) -> np.ndarray:
    import pyarrow.compute as pc

    keep = np.ones(len(table), bool)
    for column, limit in source.max_characters.items():
        lengths = pc.fill_null(pc.utf8_length(table.data.column(column).cast("string")), 0)
        keep &= lengths.to_numpy() <= limit
    return np.flatnonzero(keep)


def _refuse_unlabelled(config: DataConfig, report: dict[str, Any], num_examples: int, where: str) -> None:
    total = report["unlabelled"] + num_examples
    if total and report["unlabelled"] / total > config.max_unlabelled_share:
        raise UserError(
            f"{where}: {report['unlabelled']} of {total} rows have no room for tags, fixed text and answer in "
            f"data.max_tokens; at most {config.max_unlabelled_share:.1%} may (data.max_unlabelled_share). "
            "Raise data.max_tokens, shorten the template, or leave long rows out with max_characters."
        )
    if not num_examples and (total or report["bad_rows"]):
        raise UserError(
            *_lines([RejectedRow(*row) for row in report["bad_rows"]]), f"{where}: no row gives an example."
        )


def _lines(bad_rows: list[RejectedRow]) -> list[str]:
    return [f"{row.file}, line {row.line}: {row.reason}." for row in bad_rows[:_LISTED_ERRORS]]


def _refuse(bad_rows: list[RejectedRow]) -> None:
    lines = _lines(bad_rows)
    more = f" (the first {_LISTED_ERRORS} are above)" if len(bad_rows) > _LISTED_ERRORS else ""
    raise UserError(
        *lines,
        f"data: {len(bad_rows)} rows cannot be used{more}; mend them, or set data.on_bad_row=skip to leave them out.",
    )
