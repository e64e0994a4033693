"""Examples -> a batch: nothing lost, nothing invented, cut where learning or reading begins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagllm.data.batch import Batch, Tokens, count
from tagllm.data.collate import Collator
from tagllm.data.encode import Example
from tagllm.template import FIELD, OUTPUT, SPAN, TAG
from tests import tiny

quick = settings(max_examples=40, deadline=None)
LEARNED = (("F",), ("Learned",), ("Frozen", "Text"), ())
TERMS = ((), (SPAN,), (OUTPUT,), (SPAN, OUTPUT))
Piece = str | int


@st.composite
def cases(draw: st.DrawFn) -> tuple[Collator, list[Example]]:
    """Rows with any pieces in any order: tags twice or never, spans, outputs, with and without a target."""
    of = tiny.layout(draw(st.sampled_from(LEARNED)), length=draw(st.integers(1, 4)))
    piece: st.SearchStrategy[Piece] = st.one_of(
        st.sampled_from(sorted(tiny.KINDS)), st.integers(1, 4), st.sampled_from(["~1", "~5", ">1", ">3"])
    )
    prompts = draw(st.lists(st.lists(piece, min_size=1, max_size=7), min_size=1, max_size=5))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    rows = [tiny.example(of, prompt, random, target=draw(st.booleans())) for prompt in prompts]
    block, free, sharded, grouped = (draw(st.booleans()) for _ in range(4))
    collator = Collator(
        of.first_learned_id, draw(st.sampled_from(TERMS)), 2, draw(st.booleans()), False, block, free, sharded, grouped
    )
    return collator._replace(behind_text=draw(st.booleans())), rows


def is_label(collator: Collator, row: Example, at: int) -> bool:
    """Whether something stands before it that predicts it, and with `behind_text` something beside tags."""
    before = row.marks[:at].tolist()
    words = [mark for mark in before if mark != TAG] if collator.behind_text else before
    return row.marks[at] in collator.terms and bool(words)


def prompts_of(batch: Batch) -> list[tuple[dict[int, list[int]], list[list[int]]]]:
    """Per row: positions of the prefix -> (id, span, pool), put together from pieces and own positions; and the live
    columns."""
    found = []
    own, live = _split(batch.own), _split(batch.live)
    pieces = _split(batch.pieces.tokens)
    for b in range(len(live)):
        prefix = {at: [token, span, pool] for token, at, span, pool in own[b]}
        for placement in batch.pieces.placements:
            for token, at, span, pool in pieces[placement.piece_B[b]] if placement.piece_B[b] >= 0 else []:
                moved = placement.span_B[b] > 0  # a free span
                place = at + placement.offset_B[b] * moved
                assert place not in prefix
                prefix[place] = [token, placement.span_B[b] if moved else span, pool]
        found.append((prefix, live[b]))
    return found


def _split(tokens: Tokens) -> list[list[list[int]]]:
    columns = tokens.columns_4N[:, : sum(tokens.lengths)].T
    return [part.tolist() for part in columns.split(list(tokens.lengths))] if tokens.lengths else []


def last_needed(collator: Collator, row: Example) -> int:
    """The last position whose hidden state anybody asks for."""
    labelled = [at - 1 for at in range(len(row.ids)) if is_label(collator, row, at)]
    needed = [*labelled, row.read_at] if row.read_at >= 0 else labelled
    return max(needed, default=len(row.ids) - 1)


@quick
@given(cases())
def test_pieces_own_and_live_positions_give_the_rows_back(case: tuple[Collator, list[Example]]) -> None:
    """Nothing lost, nothing twice, each position with its span and its pooling mark; and no padding at all."""
    collator, rows = case
    batch = collator(rows)
    cuts = collator.cuts(rows)
    for row, cut, (prefix, live) in zip(rows, cuts, prompts_of(batch), strict=True):
        needed = last_needed(collator, row) + 1
        spans = np.zeros(len(row.ids), int)
        for number, (start, end) in enumerate(row.spans_at if collator.block else [], 1):
            spans[start:end] = number
        pool = np.isin(row.marks, (SPAN, FIELD))
        expected = [[int(row.ids[at]), int(spans[at]), int(pool[at])] for at in range(needed)]
        assert sorted(prefix) == list(range(cut))
        assert [prefix[at] for at in range(cut)] == expected[:cut]
        assert [[token, span, pool] for token, _, span, pool in live] == expected[cut:]
        assert [at for _, at, _, _ in live] == list(range(cut, needed))
    assert batch.prefix_lengths == cuts
    free = collator.block and collator.free_spans
    for tokens, runs in ((batch.pieces.tokens, collator.grouped or free), (batch.own, True), (batch.live, False)):
        dummy = collator.sharded and collator.frozen_prefix and runs and not sum(tokens.lengths)
        assert tokens.columns_4N.shape[1] == sum(tokens.lengths) + dummy


@quick
@given(cases(), st.randoms())
def test_what_is_shared_is_there_once(case: tuple[Collator, list[Example]], random: Any) -> None:
    """Rows three times add no free span, and no piece stands in a batch twice."""
    collator, rows = case
    once, often = collator(rows), collator(random.sample(rows * 3, 3 * len(rows)))
    assert len(set(often.pieces.keys)) == len(often.pieces.keys) == len(often.pieces.tokens.lengths)
    if collator.block and collator.free_spans:
        assert sorted(once.pieces.keys) == sorted(often.pieces.keys)
        assert set(once.own_keys) == set(often.own_keys)


@quick
@given(cases())
def test_labels_are_the_next_tokens_of_the_terms(case: tuple[Collator, list[Example]]) -> None:
    """Exactly the tokens whose mark is in `terms` (but those that nothing predicts), in order."""
    collator, rows = case
    batch = collator(rows)
    expected = [
        (i, at - 1 - cut, int(row.ids[at]), int(row.marks[at]))
        for i, (row, cut) in enumerate(zip(rows, collator.cuts(rows), strict=True))
        for at in range(len(row.ids))
        if is_label(collator, row, at)
    ]
    starts = np.cumsum([0, *batch.live.lengths])
    found = [
        (row := int(np.searchsorted(starts, flat, "right")) - 1, flat - starts[row], label, term)
        for flat, label, term in batch.labels_3M.T.tolist()
    ]
    assert found == (expected or [(0, 0, 0, -1)])
    assert all(at < batch.live.lengths[i] for i, at, _, _ in expected)


@quick
@given(cases())
def test_live_part_starts_where_learning_or_reading_begins(case: tuple[Collator, list[Example]]) -> None:
    collator, rows = case
    for row in rows:
        cut = collator.live_at(row)
        if not collator.frozen_prefix:
            assert cut == 0
            continue
        assert (row.ids[:cut] < collator.first_learned_id).all()
        assert not any(is_label(collator, row, at) for at in range(cut + 1))
        assert 0 <= cut <= last_needed(collator, row), "at least one live position"
        needed = row.ids[cut] >= collator.first_learned_id
        needed |= cut + 1 < len(row.ids) and is_label(collator, row, cut + 1)
        needed |= cut in (row.read_at, len(row.ids) - 1)
        assert needed, "and no more than needed"


@quick
@given(cases())
def test_heads_read_their_own_position_and_targets_are_padded_with_nan(case: tuple[Collator, list[Example]]) -> None:
    collator, rows = case
    batch = collator(rows)
    for i, row in enumerate(rows):
        if row.read_at >= 0:
            read_at = int(batch.read_at_B[i])
            assert batch.live.ids_N[read_at] == row.ids[row.read_at]
            assert batch.live.at_N[read_at] == row.read_at
            assert sum(batch.live.lengths[:i]) <= read_at < sum(batch.live.lengths[: i + 1])
        assert batch.head_B[i] == row.head
        assert batch.target_BK[i, : len(row.target)].tolist() == row.target.tolist()
        assert batch.target_BK[i, len(row.target) :].isnan().all()


@quick
@given(cases())
def test_counts(case: tuple[Collator, list[Example]]) -> None:
    collator, rows = case
    counts = count(collator(rows))
    for mark, found in ((SPAN, counts.span), (OUTPUT, counts.output)):
        labels = [
            row for row in rows for at in range(len(row.ids)) if is_label(collator, row, at) and row.marks[at] == mark
        ]
        assert found == len(labels)
    assert counts.value == sum(len(row.target) for row in rows)


def test_a_batch_without_labels_has_one_pad_label() -> None:
    """So that a rank without any still calls the LM head."""
    of = tiny.layout()
    batch = tiny.collator(of)([tiny.example(of, (3, "F"), np.random.default_rng(0))])
    assert (batch.label_at_M.tolist(), batch.label_term_M.tolist()) == ([0], [-1])
    assert count(batch)[:2] == (0, 0)


def test_live_at_by_example() -> None:
    """Each tag has three rows, F owns a head: learning F starts at 10, Frozen at 4; the first label of a span is read
    at 6; with nothing learned here, F still reads at 12.

    t t t t <Frozen> ~ ~ ~ <F>
    0       4        7     10
    """
    random = np.random.default_rng(0)
    prompt = (4, "Frozen", "~3", "F")
    found = []
    for learned, terms in ((("F",), ()), (("Frozen",), ()), (("F",), (SPAN,)), (("Text",), ())):
        of = tiny.layout(learned)
        found.append(tiny.collator(of, terms=terms).live_at(tiny.example(of, prompt, random)))
    assert found == [10, 4, 6, 12]


def test_a_few_words_before_the_tag_of_a_long_text_are_live() -> None:
    """Unless a pass may not depend on the rows, prefixes are shared by plan, or nothing is learned in it."""
    of, random = tiny.layout(("Learned",)), np.random.default_rng(0)
    short, long = (tiny.example(of, (3, "Learned", f"~{n}"), random) for n in (9, 60))
    plain = tiny.collator(of, terms=(SPAN,))
    assert plain.cuts([short]) == [3] and plain.cuts([long]) == [0]
    assert plain.cuts([short, short]) == [3, 3] and plain.cuts([short, long]) == [0, 0], "over the batch"
    assert sum(plain([long]).own.lengths) == 0 and plain([long]).live.lengths == (len(long.ids) - 1,)
    for setting in ("block", "sharded", "grouped", "cut_at_function"):
        row = tiny.example(of, (3, "Learned", "~60", "F"), random)
        assert tiny.collator(of, terms=(SPAN,), **{setting: True}).cuts([row])[0] > 0


@pytest.mark.parametrize("pieces", [(4, "Frozen", "~9", 3, "F", 2), (2, "F", "~2", "Learned", 1)])
def test_a_frozen_head_reads_its_own_position(pieces: tuple[Piece, ...]) -> None:
    """Text or a learned tag behind a loaded tag with a head must not move where the head reads."""
    of = tiny.layout(("Learned",))
    row = tiny.example(of, pieces, np.random.default_rng(0))
    tagged = tiny.model(of)
    full, cut = (tagged(tiny.collator(of, frozen, ())([row])).values_BK for frozen in (False, True))
    torch.testing.assert_close(cut, full, rtol=1e-4, atol=1e-5)
