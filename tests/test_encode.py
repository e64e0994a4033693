"""Rows -> examples: which token stands where, what is cut, what makes a row unusable."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tagllm.config import FieldConfig, HeadConfig, SourceConfig
from tagllm.data.dataset import Prompts
from tagllm.data.encode import Encoder, Example, Unusable
from tagllm.data.layout import TagLayout
from tagllm.errors import UserError
from tagllm.template import FIELD, OUTPUT, SPAN, TAG, TEXT, parse_template, written
from tests import tiny

KINDS = {"Protein": "domain", "SMILES": "domain", "QED": "function", "Class": "function", "Name": "function"}
HEADS = {"QED": HeadConfig(), "Class": HeadConfig(type="classification", classes=["no", "yes", "1"])}
LAYOUT = TagLayout.of(tiny.VOCABULARY, KINDS, dict.fromkeys(KINDS, 3), ("SMILES", "QED"), HEADS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path_factory.mktemp("backbone")))


def encoder(tokenizer: Any, template: str, max_tokens: int = 200, labelled: bool = True, **source: Any) -> Encoder:
    config = SourceConfig(path="a.csv", template=template, **source)
    return Encoder(parse_template(template, KINDS), config, LAYOUT, tokenizer, max_tokens, labelled)


def one(encoder: Encoder, **row: Any) -> Example:
    (result,) = encoder.encode([row])
    assert isinstance(result, Example), result
    return result


def refused(encoder: Encoder, **row: Any) -> Unusable:
    (result,) = encoder.encode([row])
    assert isinstance(result, Unusable)
    return result


def tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def test_tags_are_ids_after_the_vocabulary_frozen_ones_first() -> None:
    order = ["Protein", "Class", "Name", "SMILES", "QED"]
    assert [LAYOUT.ids(name) for name in order] == [range(96 + 3 * i, 99 + 3 * i) for i in range(5)]
    assert LAYOUT.first_learned_id == LAYOUT.ids("SMILES").start
    with pytest.raises(KeyError):
        LAYOUT.ids("Other")


@pytest.mark.parametrize("token", ["bos_token", "eos_token"])
def test_other_ends_are_other_prompts(tokenizer: Any, token: str) -> None:
    """Base and instruct models often differ in nothing else, and tokenizer.json does not say it: rows that were
    tokenised for one must not serve the other."""
    other, again = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    setattr(other, token, "<pad>")
    digests = [Prompts(LAYOUT, each, 200).digest() for each in (tokenizer, other, again)]
    assert digests[0] == digests[2] != digests[1]


def test_a_prompt_as_ids_and_marks(tokenizer: Any) -> None:
    found = one(encoder(tokenizer, "a <SMILES> {s}. It {x} <QED>", target="y"), s="CCO", x="b", y="0.5")
    expected = [
        (TEXT, tokens(tokenizer, "a")),
        (TAG, list(LAYOUT.ids("SMILES"))),
        (SPAN, tokens(tokenizer, " CCO")),
        (TEXT, tokens(tokenizer, ". It")),
        (FIELD, tokens(tokenizer, " b")),
        (TAG, list(LAYOUT.ids("QED"))),
    ]
    assert found.ids.tolist() == [token for _, ids in expected for token in ids]
    assert found.marks.tolist() == [mark for mark, ids in expected for _ in ids]
    assert (found.target.tolist(), found.head, found.tokens_cut) == ([0.5], 0, 0)
    assert found.read_at == len(found.ids) - 1
    assert found.function_at == len(found.ids) - 3


def test_a_field_twice_keeps_the_white_space_of_each_place(tokenizer: Any) -> None:
    found = one(encoder(tokenizer, "{x} and {x}, <Name>{output}"), x="ab", output="c")
    assert found.ids[:-5].tolist() == [t for text in ("ab", " and", " ab", ",") for t in tokens(tokenizer, text)]


def test_where_the_head_reads_and_the_function_tag_starts(tokenizer: Any) -> None:
    """The last row of the last tag with a head, and its start: what stands behind it has seen it. Without a head the
    start of the last function tag."""
    found = one(encoder(tokenizer, "{x} <QED> or <QED> so <Name> end", target="y"), x="a", y=1)
    assert found.ids[found.read_at] == LAYOUT.ids("QED")[-1]
    assert LAYOUT.ids("QED")[-1] not in found.ids[found.read_at + 1 :]
    assert found.function_at == found.read_at + 1 - LAYOUT.lengths["QED"]
    named = one(encoder(tokenizer, "{x} <Name> so <Name> end"), x="a")
    assert named.function_at == max(np.flatnonzero(named.ids == LAYOUT.ids("Name")[0]))
    without = one(encoder(tokenizer, "<SMILES> {x}"), x="a")
    assert (without.head, without.read_at, without.function_at) == (-1, -1, len(without.ids))


def test_the_end_of_text_follows_an_output_that_ends_the_prompt(tokenizer: Any) -> None:
    found = one(encoder(tokenizer, "{x} <Name> {output}", output="answer"), x="a", answer="bc")
    assert found.ids[-4:].tolist() == [*tokens(tokenizer, " bc"), tokenizer.eos_token_id]
    assert found.marks[-5:].tolist() == [TAG, *[OUTPUT] * 4]
    inside = one(encoder(tokenizer, "{x} <Name> {output}."), x="a", output="bc")
    assert tokenizer.eos_token_id not in inside.ids
    assert inside.marks[-1] == TEXT


def test_a_start_token_only_where_the_tokenizer_gives_one(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    template = "{x} <Name> {output}"
    row = {"x": "a", "output": "b"}
    plain = one(encoder(tokenizer, template), **row)
    with_start = AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path_factory.mktemp("backbone")))
    with_start.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = one(encoder(with_start, template), **row)
    assert found.ids.tolist() == [tokenizer.bos_token_id, *plain.ids]
    assert found.marks.tolist() == [TEXT, *plain.marks]
    assert found.function_at == plain.function_at + 1


def test_a_line_that_ends_before_the_answer_is_of_the_prompt(tokenizer: Any) -> None:
    """Generation ends with the line, so it may not begin with the end of one."""
    template = "{x} <Name> Answer:\n{output}"
    whole = one(encoder(tokenizer, template), x="a", output="b")
    prompt = one(encoder(tokenizer, template, labelled=False), x="a")
    upto = int(np.flatnonzero(whole.marks == OUTPUT)[0])
    assert whole.ids[:upto].tolist() == prompt.ids.tolist() and tokenizer.decode(prompt.ids[-1:]) == "\n"
    assert tokenizer.decode(whole.ids[upto : upto + 1]) == "b"


def test_spaced_gives_one_token_pair_per_residue_and_no_merges(tokenizer: Any) -> None:
    """The tiny tokenizer has no merges: a space and a letter; what counts is that each letter stands alone."""
    found = one(encoder(tokenizer, "<Protein> {s} <Name> {output}", fields={"s": {"characters": "spaced"}}),
                s="MKF", output="x")  # fmt: skip
    span = found.ids[found.marks == SPAN].tolist()
    assert span == tokens(tokenizer, " M K F")
    assert span[1::2] == [tokens(tokenizer, residue)[0] for residue in "MKF"]


@pytest.mark.parametrize(("side", "kept"), [("end", " abc"), ("start", "efgh"), ("middle", " agh")])
def test_a_field_is_cut_to_its_own_limit(tokenizer: Any, side: str, kept: str) -> None:
    fields = {"x": {"max_tokens": 4, "truncate": side}}
    found = one(encoder(tokenizer, "go {x} <Name> {output}", fields=fields), x="abcdefgh", output="x")
    assert found.ids[found.marks == FIELD].tolist() == tokens(tokenizer, kept)
    assert found.tokens_cut == 5


@settings(max_examples=50, deadline=None)
@given(
    a=st.text("abc", min_size=1, max_size=40),
    b=st.text("abc", min_size=1, max_size=40),
    answer=st.text("xyz", min_size=1, max_size=10),
    limit=st.integers(5, 80),
)
def test_truncation_cuts_fields_only_and_counts_what_it_cut(
    tokenizer: Any, a: str, b: str, answer: str, limit: int
) -> None:
    template = "t <SMILES> {a}, {b} <Name> {output}"
    row = {"a": a, "b": b, "output": answer}
    whole = one(encoder(tokenizer, template), **row)
    (found,) = encoder(tokenizer, template, limit).encode([row])
    fixed = int((~np.isin(whole.marks, (SPAN, FIELD))).sum())
    if isinstance(found, Unusable):
        assert found.unlabelled
        assert limit < fixed + 2, "no room for one token of each field"
        assert f"the limit is {limit}" in found.reason
        return
    assert len(found.ids) <= limit
    assert found.tokens_cut == len(whole.ids) - len(found.ids)
    for mark in (TEXT, TAG, OUTPUT):
        assert found.ids[found.marks == mark].tolist() == whole.ids[whole.marks == mark].tolist()
    for mark in (SPAN, FIELD):
        kept = found.ids[found.marks == mark].tolist()
        assert kept
        assert kept == whole.ids[whole.marks == mark].tolist()[: len(kept)]
    assert found.ids[found.function_at] == LAYOUT.ids("Name")[0]


@pytest.mark.parametrize("empty", [None, "", "  ", float("nan")])
def test_an_empty_value_is_the_mistake_of_the_row(tokenizer: Any, empty: Any) -> None:
    built = encoder(tokenizer, "{x} <Name> {output}", output="answer")
    assert refused(built, x=empty, answer="a") == Unusable("x is empty; the template needs it")
    assert refused(built, x="a", answer=empty) == Unusable("answer is empty; the template needs it")
    assert refused(built, answer="a") == Unusable("x is empty; the template needs it")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [None, "", "abc", float("nan"), "inf", "1e39", -1e300, 10**400, [1]])
def test_a_target_is_a_finite_number(tokenizer: Any, bad: Any) -> None:
    found = refused(encoder(tokenizer, "{x} <QED>", target="y"), x="a", y=bad)
    assert found == Unusable(f"y is {bad!r}; it must be a finite number")


@pytest.mark.parametrize(("given", "target"), [("1.5", 1.5), (2, 2), (True, 1), (" 3e-1 ", 0.3), (np.float64(4), 4)])
def test_numbers_in_many_forms(tokenizer: Any, given: Any, target: float) -> None:
    found = one(encoder(tokenizer, "{x} <QED>", target="y"), x="a", y=given)
    assert found.target.dtype == np.float32
    assert found.target.tolist() == pytest.approx([target])


def test_classes(tokenizer: Any) -> None:
    built = encoder(tokenizer, "{x} <Class>", target="y")
    assert [one(built, x="a", y=y).target.tolist() for y in ("no", "yes", 1)] == [[0], [1], [2]]
    assert [one(built, x="a", y=y).target.tolist() for y in (1.0, "1.0", " yes")] == [[2], [2], [1]], (
        "as tables have it"
    )
    assert one(built, x="a", y="no").head == 1
    assert refused(built, x="a", y="maybe") == Unusable("y is 'maybe'; it must be one of no, yes, 1")


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_is_missing_is_of_no_class(tokenizer: Any, missing: Any) -> None:
    """Not even of one that is called as it would be written."""
    head = HeadConfig(type="classification", classes=["None", "nan"])
    layout = LAYOUT._replace(heads={"Class": head})
    source = SourceConfig(path="a.csv", template="{x} <Class>", target="y")
    built = Encoder(parse_template("{x} <Class>", KINDS), source, layout, tokenizer, 200)
    assert "must be one of" in refused(built, x="a", y=missing).reason
    assert one(built, x="a", y="None").target.tolist() == [0]


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        ("0,5", "; decimals stand behind a point"),
        ("1234,567", "; decimals stand behind a point"),
        ("1,234", "; numbers have no thousands separators and decimals stand behind a point"),
        ("-12,345.6", "; numbers have no thousands separators"),
        ("1,234,567", "; numbers have no thousands separators"),
        ("1_234", "; numbers have no thousands separators"),
        ("1_2", ""),
        ("1,2,3", ""),
        (None, ""),
    ],
)
def test_how_a_number_is_to_be_written_is_told(tokenizer: Any, value: Any, way_out: str) -> None:
    """1.234 for 1,234 would be a thousandth of what may be meant."""
    unusable = refused(encoder(tokenizer, "{x} <QED>", target="y"), x="a", y=value)
    assert unusable.reason == f"y is {value!r}; it must be a finite number{way_out}"


def test_one_bad_row_does_not_move_the_others(tokenizer: Any) -> None:
    built = encoder(tokenizer, "{x} <QED>", target="y")
    rows = [{"x": "a", "y": 1}, {"x": "", "y": "?"}, {"x": "abc", "y": 3}]
    first, bad, last = built.encode(rows)
    assert bad == Unusable("x is empty; the template needs it"), "the first reason is told"
    for found, row in ((first, rows[0]), (last, rows[2])):
        assert isinstance(found, Example)
        assert found.ids.tolist() == one(built, **row).ids.tolist()
        assert found.target.tolist() == [row["y"]]
    assert built.encode([]) == []


def test_predicting_asks_neither_target_nor_output(tokenizer: Any) -> None:
    value = one(encoder(tokenizer, "{x} <QED>", target="y", labelled=False), x="a")
    assert (value.target.tolist(), value.head) == ([], 0)
    assert value.ids[value.read_at] == LAYOUT.ids("QED")[-1]
    template = "{x} <Name> {output}. More <Protein> {z}"
    prompt = one(encoder(tokenizer, template, labelled=False), x="a")
    whole = one(encoder(tokenizer, template), x="a", output="b", z="c")
    assert prompt.ids.tolist() == whole.ids[: len(prompt.ids)].tolist()
    assert whole.marks[len(prompt.ids)] == OUTPUT
    assert prompt.ids[-1] == LAYOUT.ids("Name")[-1]


def test_fields_spans_and_what_a_group_shares(tokenizer: Any) -> None:
    """Spans begin with the text in front of their domain tag; rows of a group are alike up to the next field, text and
    tags included."""
    template = "p <Protein> {s}. d <SMILES> {d}. n {n} <QED>"
    made = encoder(tokenizer, template, target="y", group_by="s")
    rows = [one(made, s="MK", d="CCO", n="1", y=0), one(made, s="MK", d="N", n="2", y=0)]
    other = one(made, s="MKV", d="CCO", n="1", y=0)
    for row in rows:
        assert [tokenizer.decode(row.ids[at]) for at in row.fields_at] == [" ", " ", " "]
        assert row.spans_at.shape == (2, 2)
        for (start, end), text, tag in zip(row.spans_at, ("p", ". d"), ("Protein", "SMILES"), strict=True):
            head = [*tokens(tokenizer, text), *LAYOUT.ids(tag)]
            assert row.ids[start : start + len(head)].tolist() == head
            assert set(row.marks[start + len(head) : end]) == {SPAN}
            assert row.marks[end] == TEXT
        assert row.alike_to == row.fields_at[1]
    bare = one(encoder(tokenizer, "<Protein> {s} <SMILES> {d} <QED>", target="y"), s="MK", d="CCO", y=0)
    for (start, _), tag in zip(bare.spans_at, ("Protein", "SMILES"), strict=True):
        assert bare.ids[start : start + 3].tolist() == list(LAYOUT.ids(tag)), "and with the tag where there is none"
    assert rows[0].ids[: rows[0].alike_to].tolist() == rows[1].ids[: rows[1].alike_to].tolist()
    assert rows[0].group == rows[1].group != other.group
    assert min(rows[0].group, other.group) >= 0
    whole = encoder(tokenizer, template, target="y", group_by=["s", "n"])
    assert one(whole, s="MK", d="CCO", n="1", y=0).alike_to == len(rows[0].ids)
    none = one(encoder(tokenizer, template, target="y"), s="MK", d="CCO", n="1", y=0)
    assert (none.group, none.alike_to) == (-1, 0)


def test_numbers_are_written_with_so_many_decimals() -> None:
    config = FieldConfig(decimals=2)
    assert [written(value, config) for value in (0.123456, "7", -0.001, None)] == ["0.12", "7.00", "0.00", ""]
    assert written(0.123456, FieldConfig()) == "0.123456"
    assert [written(value, FieldConfig()) for value in (25, 25.0, "25.0", -0.5, 1e20)] == [
        "25", "25", "25.0", "-0.5", "1e+20",
    ], "a column with a gap holds floats, and text stays as it is"  # fmt: skip
    for value in ("seven", math.inf, "nan"):
        with pytest.raises(ValueError, match="could not convert|not finite"):
            written(value, config)


def test_an_answer_of_several_lines_is_told(tokenizer: Any) -> None:
    several, one = encoder(tokenizer, "{sequence} <Name> {output}").encode(
        [{"sequence": "A", "output": "a\nb"}, {"sequence": "A", "output": "a\n"}]
    )
    assert isinstance(several, Unusable) and "output has several lines" in several.reason
    assert isinstance(one, Example)


def test_a_sequence_that_is_broken_into_lines_is_spaced_alike(tokenizer: Any) -> None:
    of = encoder(tokenizer, "{sequence} <Name> {output}", fields={"sequence": {"characters": "spaced"}})
    whole, broken = of.encode([{"sequence": text, "output": "a"} for text in ("MKVLLA", " MKV\nLL A")])
    assert isinstance(whole, Example) and isinstance(broken, Example) and whole.ids.tolist() == broken.ids.tolist()


def test_a_value_that_spells_a_special_token_is_text(tokenizer: Any) -> None:
    """In the template it may be meant, as in the prompts of chat models."""
    row = one(encoder(tokenizer, "\\</s> {a} is <Name> {output}"), a="C</s>C", output="x</s>")
    assert (row.ids == tokenizer.eos_token_id).sum() == 2, "that of the template, and the end"
    assert row.ids[-1] == tokenizer.eos_token_id and row.ids[0] == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match=r"{x} <Name> {output}' has {output}, and .*Set eos_token in its"):
        encoder(endless, "{x} <Name> {output}")
    encoder(endless, "{x} <QED>", target="y")


def test_tokens_beyond_the_embedding_are_no_tag_rows(tokenizer: Any) -> None:
    """Such a tokenizer is sound for texts without them, as a [PAD] that was added and is in none."""
    more = copy.deepcopy(tokenizer)
    filler = tiny.VOCABULARY - len(more)
    more.add_tokens([f"filler{n}" for n in range(filler)] + ["[Na+]"])
    assert more.convert_tokens_to_ids("[Na+]") == tiny.VOCABULARY, "the first row of a tag"
    told = r"the token '\[Na\+\]' \(id 96\), but the backbone's embedding has 96 rows"
    with pytest.raises(UserError, match=f"template: .* has {told}. Take it out"):
        encoder(more, "{x} [Na+] <QED>", target="y")
    bad, good = encoder(more, "{x} <QED>", target="y").encode([{"x": "C[Na+]", "y": 1}, {"x": "CNa", "y": 1}])
    assert isinstance(bad, Unusable) and re.match(f"x has {told}", bad.reason)
    assert isinstance(good, Example)
