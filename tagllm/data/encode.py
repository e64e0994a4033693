"""Rows -> examples: token ids with a mark per position, the target, and where the head reads."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagllm.config import FieldConfig, SourceConfig
from tagllm.data.layout import TagLayout
from tagllm.data.pieces import tokens_of
from tagllm.errors import UserError
from tagllm.template import (
    FIELD,
    OUTPUT,
    SPAN,
    TAG,
    Template,
    field_text,
    fit,
    marks_of,
    pool_of,
    pools_of,
    spans_of,
    truncate,
    written,
)

_LARGEST = float(np.finfo(np.float32).max)
_THOUSANDS = re.compile(r"\s*[-+]?[1-9]\d{0,2}([,_]\d{3})+(\.\d*)?\s*")


class Example(NamedTuple):
    """One row as the model sees it.

    `pools` says for each position which mean over fields it goes into, from 1 (0: none).
    `target` holds numbers (regression) or one class index; empty without a head. `head` indexes `TagLayout.heads` or is
    -1; `read_at` is the position of the last row of the function tag that owns it. `function_at` is where that tag
    starts (without a head the last function tag, or the length of the prompt): everything before is what a probe on the
    frozen LLM may see.

    `fields_at` are the positions where fields start; `spans_at` (n, 2) where each span (`spans_of`) starts and ends.
    `group` is the same for rows with the same `group_by` values (-1: not grouped), and these are alike up to
    `alike_to`. `origin` is its file and line.
    """

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    pools: NDArray[np.uint8]
    target: NDArray[np.float32]
    head: int
    read_at: int
    function_at: int
    tokens_cut: int
    fields_at: NDArray[np.int32] = np.zeros(0, np.int32)
    spans_at: NDArray[np.int32] = np.zeros((0, 2), np.int32)
    group: int = -1
    alike_to: int = 0
    origin: str = ""


class Unusable(NamedTuple):
    """Why a row gives no example. `unlabelled`: truncation would have left no label (not the row's own mistake)."""

    reason: str
    unlabelled: bool = False


class Encoder:
    """Turns rows of one source into examples. Values are tokenised in batches, fixed text once.

    Args:
        labelled: False when predicting: neither target nor {output} is asked of a row.

    Raises:
        UserError: an answer could not end, or the fixed text has a token that the backbone does not know.
    """

    def __init__(
        self, template: Template, source: SourceConfig, layout: TagLayout, tokenizer: Any, max_tokens: int,
        labelled: bool = True,
    ) -> None:  # fmt: skip
        self.source, self.layout, self.tokenizer, self.max_tokens = source, layout, tokenizer, max_tokens
        parts = template.parts
        if not labelled:  # generation starts where {output} stood
            parts = parts[: next((i for i, p in enumerate(parts) if p.is_output), None)]
        self.template, self.labelled = template._replace(parts=parts), labelled
        self.marks = marks_of(self.template, layout.kinds)
        self.pools = pools_of(self.template, layout.kinds, pool_of(layout.heads.values()))
        there = [i for i, part in enumerate(parts) if part.kind != "tag" or layout.lengths[part.value]]
        self.first = there[0] if there else 0
        self.fixed = {
            i: tokens_of(tokenizer, [part.value], begins=i == self.first)[0]
            for i, part in enumerate(parts)
            if part.kind == "text"
        }
        functions = [i for i, p in enumerate(parts) if p.kind == "tag" and layout.kinds[p.value] == "function"]
        owner = next((parts[i].value for i in reversed(functions) if parts[i].value in layout.heads), None)
        self.head = list(layout.heads).index(owner) if owner else -1
        self.head_part = max(i for i in functions if parts[i].value == owner) if owner else None
        self.function_part = self.head_part if owner else functions[-1] if functions else None
        self.spec = layout.heads[owner] if owner else None
        start = tokenizer("a").input_ids
        self.bos = [tokenizer.bos_token_id] if start and start[0] == tokenizer.bos_token_id else []
        self.inputs = [i for i, part in enumerate(parts) if part.kind == "field" and self.marks[i] != OUTPUT]
        self.spans = spans_of(self.marks)
        grouped = [at for at, i in enumerate(self.inputs) if parts[i].value in source.group_by]
        self.num_alike = grouped[-1] + 1 if grouped else 0
        if template.has_output and tokenizer.eos_token_id is None:
            raise UserError(
                f"template: {template.text!r} has {{output}}, and the tokenizer has no token that ends a text (its "
                "eos_token is None), with which an answer ends. Set eos_token in its tokenizer_config.json."
            )
        ends_with_output = bool(parts) and parts[-1].is_output
        self.eos = [tokenizer.eos_token_id] if ends_with_output else []
        for ids in (self.bos, *self.fixed.values(), self.eos):
            if unknown := self._unknown(ids):
                raise UserError(f"template: {template.text!r} has {unknown}. Take it out, or load its own tokenizer.")

    def _unknown(self, ids: Sequence[int]) -> str:
        """What of these ids is beyond the backbone's embedding, where the rows of tags stand: tokens may be added to a
        tokenizer alone."""
        if max(ids, default=0) < self.layout.vocabulary_size:
            return ""
        at = max(ids)
        token = self.tokenizer.convert_ids_to_tokens(at)
        return f"the token {token!r} (id {at}), but the backbone's embedding has {self.layout.vocabulary_size} rows"

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Example | Unusable]:
        """One result per row, in order."""
        reasons: list[str] = [""] * len(rows)
        columns: dict[int, list[list[int]]] = {}
        for at, part in enumerate(self.template.parts):
            if part.kind == "field":
                config = self.source.fields.get(part.value, FieldConfig())
                texts = [self._text(row, part.value, config, reasons, i) for i, row in enumerate(rows)]
                shown = [field_text(text, part, config) for text in texts]
                columns[at] = tokens_of(self.tokenizer, shown, literal=True, begins=at == self.first)
                for i, unknown in enumerate(map(self._unknown, columns[at])):
                    reasons[i] = reasons[i] or (f"{part.value} has {unknown}" if unknown else "")
        results: list[Example | Unusable] = []
        for i, row in enumerate(rows):
            target = self._target(row, reasons, i)
            values = {at: ids[i] for at, ids in columns.items()}
            results.append(Unusable(reasons[i]) if reasons[i] else self._assemble(values, target, self._group(row)))
        return results

    def _text(self, row: Mapping[str, Any], name: str, config: FieldConfig, reasons: list[str], i: int) -> str:
        column = self.source.output if name == "output" else name
        try:
            text = written(row.get(column), config)
        except ValueError:
            text = str(row[column])
            reasons[i] = reasons[i] or f"{column} is {text!r}; fields.{name}.decimals needs a finite number"
        if not text.strip():
            reasons[i] = reasons[i] or f"{column} is empty; the template needs it"
        if name == "output" and "\n" in text.strip():
            reasons[i] = reasons[i] or f"{column} has several lines; an answer is one, for generation ends with it"
        return text

    def _group(self, row: Mapping[str, Any]) -> int:
        """A 63-bit digest of the grouping columns; -1 without any."""
        if not self.source.group_by:
            return -1
        values = "\0".join(str(row[column]) for column in self.source.group_by)
        return int.from_bytes(hashlib.blake2b(values.encode(), digest_size=8).digest()) >> 1

    def _target(self, row: Mapping[str, Any], reasons: list[str], i: int) -> NDArray[np.float32]:
        target = np.zeros(0, np.float32)
        if self.spec is None or not self.labelled:
            return target
        values = [row.get(column) for column in self.source.target]
        if self.spec.classes:
            label = _label(values[0], self.spec.classes)
            if label not in self.spec.classes:
                reasons[i] = reasons[i] or (
                    f"{self.source.target[0]} is {values[0]!r}; it must be one of {', '.join(self.spec.classes)}"
                )
                return target
            return np.array([self.spec.classes.index(label)], np.float32)
        numbers = [_number(value) for value in values]
        for column, value, number in zip(self.source.target, values, numbers, strict=True):
            if not abs(number) <= _LARGEST:  # NaN too
                reasons[i] = reasons[i] or f"{column} is {value!r}; it must be a finite number{_way_out(value)}"
        return target if reasons[i] else np.array(numbers, np.float32)

    def _assemble(self, values: Mapping[int, list[int]], target: NDArray[np.float32], group: int) -> Example | Unusable:
        parts, inputs = self.template.parts, self.inputs
        configs = [self.source.fields.get(parts[i].value, FieldConfig()) for i in inputs]
        whole = [values[i] for i in inputs]
        capped = [
            truncate(ids, config.max_tokens or len(ids), config.truncate)
            for ids, config in zip(whole, configs, strict=True)
        ]
        pieces = [self._fixed_ids(i, values) for i in range(len(parts))]
        rest = len(self.bos) + sum(map(len, pieces)) + len(self.eos)
        fitted = fit(capped, [config.truncate for config in configs], self.max_tokens - rest)
        if fitted is None:
            return Unusable(
                f"the fixed text, tags and answer alone take {rest} tokens; the limit is {self.max_tokens}", True
            )
        for i, ids in zip(inputs, fitted, strict=True):
            pieces[i] = ids
        starts = np.cumsum([len(self.bos), *map(len, pieces)])
        ids = [*self.bos, *(token for piece in pieces for token in piece), *self.eos]
        lengths = [len(self.bos), *map(len, pieces), len(self.eos)]
        return Example(
            np.array(ids, np.int32),
            np.repeat(np.array([0, *self.marks, OUTPUT], np.uint8), lengths),
            np.repeat(np.array([0, *self.pools, 0], np.uint8), lengths),
            target,
            self.head,
            int(starts[self.head_part + 1]) - 1 if self.head_part is not None else -1,
            int(starts[self.function_part]) if self.function_part is not None else len(ids),
            sum(map(len, whole)) - sum(map(len, fitted)),
            starts[inputs].astype(np.int32),
            np.array([(starts[first], starts[field + 1]) for first, field in self.spans], np.int32).reshape(-1, 2),
            group,
            int(starts[[*inputs, -1][self.num_alike]]) if self.num_alike else 0,
        )

    def _fixed_ids(self, part_at: int, values: Mapping[int, list[int]]) -> Sequence[int]:
        part, mark = self.template.parts[part_at], self.marks[part_at]
        if mark == TAG:
            return self.layout.ids(part.value)
        if mark == OUTPUT:
            return values[part_at]
        return [] if mark in (SPAN, FIELD) else self.fixed[part_at]


def _label(value: Any, classes: Collection[str]) -> str:
    """As the classes have it: a column of whole numbers with a gap holds 1.0, and so does the file made of it."""
    text = written(value, FieldConfig()).strip()
    return text if text in classes else text.removesuffix(".0")


def _way_out(value: Any) -> str:
    """What a text means that other writers of numbers know. A comma in 1,234 may part thousands, which a point there
    would make a thousandth of."""
    if not isinstance(value, str):
        return ""
    thousands = bool(_THOUSANDS.fullmatch(value))
    decimals = "," in value and math.isfinite(_number(value.replace(",", ".")))
    hints = ["numbers have no thousands separators"] * thousands + ["decimals stand behind a point"] * decimals
    return f"; {' and '.join(hints)}" if hints else ""


def _number(value: Any) -> float:
    if isinstance(value, str) and "_" in value:  # Python's own way to write thousands
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
