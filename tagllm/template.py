"""Prompt templates: `"The molecule is <SMILES> {smiles}. Its drug-likeness is <QED>"` -> parts -> token ids.

A domain tag, the field right behind it and the text in front of it form a span. White space before a field belongs to
the field, so that its value is tokenised as in running text; white space before a tag is dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from tagllm.config import FieldConfig, HeadConfig, Pool
from tagllm.errors import UserError, did_you_mean

TEXT, SPAN, OUTPUT, FIELD, TAG = range(5)
"""Marks of a position: fixed text, a field behind a domain tag, {output}, another field, a tag row."""

_TOKEN = re.compile(r"\\(?P<escaped>[<{}\\])|<(?P<tag>[^<>{}\s]+)>|\{(?P<field>[^<>{}]*)\}")


class Part(NamedTuple):
    """`value` is literal text, a tag's name or a field's name; `space` stood before a field."""

    kind: Literal["text", "tag", "field"]
    value: str
    space: str = ""

    @property
    def is_output(self) -> bool:
        """Whether it is `{output}`, the answer in text."""
        return self.kind == "field" and self.value == "output"


class Template(NamedTuple):
    text: str
    parts: tuple[Part, ...]

    @property
    def tags(self) -> list[str]:
        return [part.value for part in self.parts if part.kind == "tag"]

    @property
    def fields(self) -> list[str]:
        """Names of the input fields, each once, in order; without `output`."""
        return list(dict.fromkeys(p.value for p in self.parts if p.kind == "field" and not p.is_output))

    @property
    def has_output(self) -> bool:
        return any(part.is_output for part in self.parts)


def parse_template(text: str, known_tags: Mapping[str, str], where: str = "template") -> Template:
    """Splits a template into parts. `known_tags` maps names to kinds (domain, function).

    `\\<`, `\\{`, `\\}` and `\\\\` stand for the characters themselves.

    Raises:
        UserError: an unknown tag, an empty or doubled `{output}`, a brace without its other half, or no field;
            every problem at once.
    """
    parts: list[Part] = []
    problems: list[str] = []
    literal, at = "", 0
    for match in _TOKEN.finditer(text):
        literal, at = literal + _plain(text[at : match.start()], known_tags, problems, where), match.end()
        if match["escaped"]:
            literal += match["escaped"]
        elif match["tag"] is not None:
            if match["tag"] not in known_tags:
                problems.append(f'{where}: "{match["tag"]}" is no tag. {did_you_mean(match["tag"], known_tags)}')
            _append_text(parts, literal.rstrip())
            parts.append(Part("tag", match["tag"]))
            literal = ""
        else:
            if not match["field"].strip():
                problems.append(f"{where}: {{}} names no column; write {{column}}, or \\{{ for a brace.")
            kept = literal.rstrip()
            if match["field"].strip() == "output" and "\n" in literal[len(kept) :]:
                kept = literal  # an answer ends with its line, so it does not begin with the end of one
            _append_text(parts, kept)
            parts.append(Part("field", match["field"].strip(), literal[len(kept) :]))
            literal = ""
    _append_text(parts, literal + _plain(text[at:], known_tags, problems, where))
    outputs = sum(part.is_output for part in parts)
    if outputs > 1:
        problems.append(f"{where}: {{output}} stands {outputs} times; it may stand once.")
    if not any(part.kind == "field" for part in parts):
        problems.append(f"{where}: {text!r} has no {{field}}; every row would give the same prompt.")
    if problems:
        raise UserError(*problems)
    return Template(text, tuple(parts))


def _append_text(parts: list[Part], literal: str) -> None:
    if literal:
        parts.append(Part("text", literal))


def _plain(literal: str, known_tags: Collection[str], problems: list[str], where: str) -> str:
    problems += [
        f"{where}: <{name} has no > behind it; write <{name}>, or \\< for the sign."
        for name in re.findall(r"<([\w-]+)", literal)
        if name in known_tags
    ]
    if "{" in literal or "}" in literal:
        problems.append(f"{where}: a brace without its other half in {literal!r}; write \\{{ for a brace.")
    return literal


def marks_of(template: Template, kinds: Mapping[str, str]) -> list[int]:
    """The mark of each part. A field is SPAN when a domain tag stands right before it."""
    marks = []
    for before, part in zip((None, *template.parts), template.parts, strict=False):
        if part.kind == "text":
            marks.append(TEXT)
        elif part.kind == "tag":
            marks.append(TAG)
        elif part.is_output:
            marks.append(OUTPUT)
        else:
            behind_domain = before is not None and before.kind == "tag" and kinds[before.value] == "domain"
            marks.append(SPAN if behind_domain else FIELD)
    return marks


def spans_of(marks: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last part of each span: the text in front of a domain tag, or the tag, and the field behind it.

    Under the block mask the first position of a span is all that its first rows can look at. LLMs need one that means
    nothing there (attention sinks, Xiao et al., ICLR 2024): with a tag trained behind text in its place a kernel on
    molecules has an error of .40, with a word in front .26 (results/notes.md)."""
    fields = [at for at, mark in enumerate(marks) if mark == SPAN]
    return [(at - 2 if at > 1 and marks[at - 2] == TEXT else at - 1, at) for at in fields]


class Pooled(NamedTuple):
    """A field that goes into a mean: the domain tag right before it, if there is one, and its column."""

    tag: str | None
    column: str

    def of(self, pool: Pool) -> Pooled | None:
        """What has the same is in the same mean."""
        return {"together": None, "apart": self if self.tag is None else Pooled(self.tag, ""), "each": self}[pool]


def _pooled(template: Template, kinds: Mapping[str, str]) -> list[Pooled | None]:
    """Of each part."""
    found: list[Pooled | None] = []
    for before, part, mark in zip((None, *template.parts), template.parts, marks_of(template, kinds), strict=False):
        tag = before.value if before is not None and mark == SPAN else None
        found.append(Pooled(tag, part.value) if mark in (SPAN, FIELD) else None)
    return found


def pools_of(template: Template, kinds: Mapping[str, str], pool: Pool) -> list[int]:
    """Which mean each part goes into, from 1 (0: none). Taken apart, fields behind the same domain tag share one, and
    of the others each column has its own."""
    fields = _pooled(template, kinds)
    order = list(dict.fromkeys(field.of(pool) for field in fields if field is not None))
    return [0 if field is None else order.index(field.of(pool)) + 1 for field in fields]


def pool_of(heads: Iterable[HeadConfig]) -> Pool:
    """How heads that answer together take means: the finest way that any of them has."""
    return max((head.pool for head in heads), key=get_args(Pool).index, default="together")


def all_pools(
    templates: Iterable[Template], kinds: Mapping[str, str], pool: Pool, known: Iterable[tuple[int, ...]] = ()
) -> tuple[int, ...]:
    """One number for each mean that heads read side by side: which domain tag, or field without one, it is of. From the
    template with the most means, or from a trained head (`known`) that has more."""

    def one(template: Template) -> tuple[int, ...]:
        fields = [field for field in _pooled(template, kinds) if field is not None]
        owner_of = {field.of(pool): field.of("apart") for field in fields}
        owners = list(dict.fromkeys(owner_of.values()))
        return tuple(owners.index(owner) for owner in owner_of.values()) or (0,)

    if pool == "together":
        return (0,)
    return max([*map(one, templates), *known], key=len, default=(0,))


def owners_of(template: Template, kinds: Mapping[str, str], pool: Pool) -> tuple[str, ...]:
    """Whose each mean is that heads read side by side of this template: `<TAG>`, or `{column}` without a tag."""
    fields = [field for field in _pooled(template, kinds) if field is not None]
    owner_of = {field.of(pool): f"<{field.tag}>" if field.tag else f"{{{field.column}}}" for field in fields}
    return () if pool == "together" else tuple(owner_of.values())


def behind_one_tag(template: Template, kinds: Mapping[str, str]) -> list[list[str]]:
    """Columns of fields that stand behind the same domain tag, of each tag with several."""
    columns: dict[str, list[str]] = {}
    for field in dict.fromkeys(_pooled(template, kinds)):
        if field is not None and field.tag is not None:
            columns.setdefault(field.tag, []).append(field.column)
    return [some for some in columns.values() if len(some) > 1]


def is_missing(value: Any) -> bool:
    """JSON's null and NaN, and what tables have in their place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def written(value: Any, config: FieldConfig) -> str:
    """The value of a column as text, empty where there is none. Whole numbers are written alike whatever type their
    column has: one with a gap holds floats.

    Raises:
        ValueError: `decimals` is given and the value is no finite number.
    """
    if is_missing(value):
        return ""
    if config.decimals is None:
        return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not finite")
    return f"{number:z.{config.decimals}f}"  # z: no -0.00


def escaped(text: str) -> str:
    """Text as it must stand in a template to mean itself."""
    return re.sub(r"[<{}\\]", r"\\\g<0>", text)


def unbroken(text: str, config: FieldConfig) -> str:
    """Without white space that no prompt shows: a sequence that is spaced may be broken into lines."""
    return "".join(text.split()) if config.characters == "spaced" else text


def field_text(value: str, part: Part, config: FieldConfig) -> str:
    """The text of a field as it is tokenised."""
    text = unbroken(value, config)
    return " " + " ".join(text) if config.characters == "spaced" else part.space + text


def truncate(ids: Sequence[int], length: int, side: str) -> list[int]:
    """Cuts a value to `length` tokens, at its end, its start, or in the middle."""
    if len(ids) <= length:
        return list(ids)
    if side == "start":
        return list(ids[len(ids) - length :])
    if side == "middle":
        head = (length + 1) // 2
        return [*ids[:head], *ids[len(ids) - (length - head) :]]
    return list(ids[:length])


def fit(fields: Sequence[Sequence[int]], sides: Sequence[str], budget: int) -> list[list[int]] | None:
    """Truncates the longest fields first until all fit into `budget` tokens; None when they cannot.

    The policy in words: the longest field is levelled down to the next longest, and so on; a tag, the fixed text and
    {output} are never touched, and no field vanishes.
    """
    if sum(map(len, fields)) <= budget:
        return [list(ids) for ids in fields]
    if budget < len(fields):
        return None
    caps = [len(ids) for ids in fields]
    low, high = 1, max(caps)
    while low < high:  # the largest common cap that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(cap, middle) for cap in caps) <= budget else (low, middle - 1)
    return [truncate(ids, min(len(ids), low), side) for ids, side in zip(fields, sides, strict=True)]
