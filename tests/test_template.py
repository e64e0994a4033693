"""Prompt templates: what stands where, whose white space is whose, which tokens are cut, and what a mistake is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tagllm.config import FieldConfig
from tagllm.errors import UserError
from tagllm.template import (
    FIELD,
    OUTPUT,
    SPAN,
    TAG,
    TEXT,
    Part,
    behind_one_tag,
    field_text,
    fit,
    marks_of,
    parse_template,
    truncate,
)

KINDS = {"Protein": "domain", "SMILES": "domain", "QED": "function", "Affinity": "function"}
quick = settings(max_examples=100, deadline=None)


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        parse_template(text, KINDS, "here")
    return raised.value.problems


def test_several_fields_and_tags() -> None:
    template = parse_template(
        "The protein is <Protein> {sequence}. The drug is <SMILES> {smiles}. It is <Affinity>", KINDS
    )
    assert template.parts == (
        Part("text", "The protein is"),
        Part("tag", "Protein"),
        Part("field", "sequence", " "),
        Part("text", ". The drug is"),
        Part("tag", "SMILES"),
        Part("field", "smiles", " "),
        Part("text", ". It is"),
        Part("tag", "Affinity"),
    )
    assert template.tags == ["Protein", "SMILES", "Affinity"]
    assert template.fields == ["sequence", "smiles"]
    assert not template.has_output


def test_a_tag_and_a_field_may_stand_twice() -> None:
    template = parse_template("<SMILES> {a} or <SMILES> {b} or {a}", KINDS)
    assert template.tags == ["SMILES", "SMILES"]
    assert template.fields == ["a", "b"]


def test_output_is_no_input_field() -> None:
    template = parse_template("<SMILES> {a}<QED> {output}", KINDS)
    assert template.has_output
    assert template.fields == ["a"]
    assert marks_of(template, KINDS) == [TAG, SPAN, TAG, OUTPUT]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (r"a \{b\} {x}", "a {b}"),
        (r"a \<QED> {x}", "a <QED>"),
        (r"a \\ {x}", "a \\"),
        ("a < b, c > d {x}", "a < b, c > d"),
        (r"C:\new {x}", r"C:\new"),
    ],
)
def test_escapes_and_characters_that_need_none(text: str, meant: str) -> None:
    assert parse_template(text, KINDS).parts == (Part("text", meant), Part("field", "x", " "))


@quick
@given(st.text(min_size=1))
@example("\\")
@example("<QED>{x}")
def test_any_text_can_be_escaped(text: str) -> None:
    escaped = "".join("\\" + c if c in "<{}\\" else c for c in text)
    parts = parse_template("{x}" + escaped, KINDS).parts
    assert parts == (Part("field", "x"), Part("text", text))


pieces = st.lists(
    st.one_of(
        st.sampled_from([f"<{name}>" for name in KINDS]),
        st.sampled_from(["{a}", "{b c}"]),
        st.text(alphabet="ab. \n", min_size=1, max_size=5),
    ),
    max_size=8,
)


@quick
@given(pieces)
def test_nothing_is_lost_but_white_space_before_tags(found: list[str]) -> None:
    """The parts, put together again, are the text; only white space before a tag went."""
    text = "".join([*found, "{x}"])
    parts = parse_template(text, KINDS).parts
    again = "".join(
        {"text": part.value, "tag": f"<{part.value}>", "field": f"{part.space}{{{part.value}}}"}[part.kind]
        for part in parts
    )
    while " <" in text or "\n<" in text:
        text = text.replace(" <", "<").replace("\n<", "<")
    assert again == text


@quick
@given(st.text(alphabet="ab <>{}\\Q", max_size=20))
def test_any_template_is_parsed_or_refused_in_words(text: str) -> None:
    found, parts = [], ()
    try:
        parts = parse_template(text, KINDS).parts
    except UserError as error:
        found = error.problems
    assert bool(parts) != bool(found)
    assert all(problem.startswith("template: ") for problem in found)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<Protien> {a}", 'here: "Protien" is no tag. Known: Affinity, Protein, QED, SMILES. Did you mean Protein?'),
        ("<xyz> {a}", 'here: "xyz" is no tag. Known: Affinity, Protein, QED, SMILES.'),
        ("{} {a}", "here: {} names no column; write {column}, or \\{ for a brace."),
        ("{ } {a}", "here: {} names no column; write {column}, or \\{ for a brace."),
        ("{a} b}", "here: a brace without its other half in ' b}'; write \\{ for a brace."),
        ("b { {a}", "here: a brace without its other half in 'b { '; write \\{ for a brace."),
        ("{a} <QED", "here: <QED has no > behind it; write <QED>, or \\< for the sign."),
        ("<SMILES {a}", "here: <SMILES has no > behind it; write <SMILES>, or \\< for the sign."),
        ("{a} {", "here: a brace without its other half in ' {'; write \\{ for a brace."),
        ("{output} {a} {output}", "here: {output} stands 2 times; it may stand once."),
        ("only <QED>", "here: 'only <QED>' has no {field}; every row would give the same prompt."),
        ("", "here: '' has no {field}; every row would give the same prompt."),
    ],
)
def test_mistakes(text: str, told: str) -> None:
    assert problems(text) == [told]


def test_all_mistakes_at_once() -> None:
    found = problems("<Protien> {output} } {output} {}")
    assert len(found) == 4
    for told, part in zip(found, ["Protien", "brace without", "{} names no", "stands 2 times"], strict=True):
        assert part in told


def test_white_space_goes_with_the_field_and_not_with_the_tag() -> None:
    parts = parse_template("a <SMILES> {x} , \n{y}{z} <QED> is", KINDS).parts
    assert [(p.value, p.space) for p in parts] == [
        ("a", ""),
        ("SMILES", ""),
        ("x", " "),
        (" ,", ""),
        ("y", " \n"),
        ("z", ""),
        ("QED", ""),
        (" is", ""),
    ]


def test_marks() -> None:
    """Only a field right behind a domain tag is a span."""
    template = parse_template("t <SMILES> {a} {b} <QED> {c} <Protein>: {d} <SMILES> {output}", KINDS)
    assert marks_of(template, KINDS) == [TEXT, TAG, SPAN, FIELD, TAG, FIELD, TAG, TEXT, FIELD, TAG, OUTPUT]


def test_spaced_puts_a_space_before_every_character() -> None:
    spaced = FieldConfig(characters="spaced")
    assert field_text("MKF", Part("field", "x"), spaced) == " M K F"
    assert field_text(" MKF\n", Part("field", "x", " "), spaced) == " M K F"
    assert field_text("MKF", Part("field", "x"), FieldConfig()) == "MKF"
    assert field_text("MKF", Part("field", "x", "\n"), FieldConfig()) == "\nMKF"


@pytest.mark.parametrize(
    ("side", "length", "kept"),
    [
        ("end", 3, [0, 1, 2]),
        ("start", 3, [4, 5, 6]),
        ("middle", 3, [0, 1, 6]),
        ("middle", 4, [0, 1, 5, 6]),
        ("middle", 1, [0]),
        ("end", 7, list(range(7))),
        ("middle", 9, list(range(7))),
    ],
)
def test_truncate(side: str, length: int, kept: list[int]) -> None:
    assert truncate(range(7), length, side) == kept


sides_st = st.sampled_from(["end", "start", "middle"])


@quick
@given(st.lists(st.integers(), max_size=30), st.integers(1, 30), sides_st)
def test_truncate_keeps_the_sides_it_promises(ids: list[int], length: int, side: str) -> None:
    kept = truncate(ids, length, side)
    assert len(kept) == min(length, len(ids))
    head = {"end": len(kept), "start": 0, "middle": (len(kept) + 1) // 2}[side]
    assert kept[:head] == ids[:head]
    assert kept[head:] == ids[len(ids) - (len(kept) - head) :]


@quick
@given(
    fields=st.lists(st.tuples(st.integers(1, 30), sides_st), max_size=5),
    budget=st.integers(-5, 120),
)
def test_fit(fields: Sequence[tuple[int, str]], budget: int) -> None:
    """Within the budget, no field gone, only the longest cut, to one common length, and no more than needed."""
    whole = [list(range(length)) for length, _ in fields]
    sides = [side for _, side in fields]
    fitted = fit(whole, sides, budget)
    if fitted is None:
        assert budget < len(fields)
        return
    lengths = [len(ids) for ids in fitted]
    assert sum(lengths) <= budget
    assert all(lengths)
    for ids, kept, side in zip(whole, fitted, sides, strict=True):
        assert kept == truncate(ids, len(kept), side)
    cut = [i for i, ids in enumerate(whole) if len(fitted[i]) < len(ids)]
    if cut:
        assert {lengths[i] for i in cut} == {max(lengths)}, "the cut ones are level, and none is longer"
        assert budget - sum(lengths) < len(cut), "one more token each would not fit"
    else:
        assert fitted == whole


def test_fields_behind_one_tag() -> None:
    kinds = {"D": "domain", "P": "domain", "T": "function"}
    template = parse_template("on {line}: <D> {a} <D> {b} <D> {a} <P> {p} <T>", kinds)
    assert behind_one_tag(template, kinds) == [["a", "b"]]
    assert behind_one_tag(parse_template("<D> {a} {b} <T>", kinds), kinds) == []
