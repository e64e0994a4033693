"""Examples -> padded tensors: nothing lost, nothing invented, cut where learning or reading begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagllm.data.batch import Batch, Collator, count
from tagllm.data.encode import Example
from tagllm.template import FIELD, OUTPUT, SPAN
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
    collator = Collator(
        of.first_learned_id, draw(st.sampled_from(TERMS)), 2, draw(st.booleans()), draw(st.integers(0, 1))
    )
    return collator, rows


def collated(collator: Collator, rows: Sequence[Example]) -> Batch:
    return collator(rows, range(10, 10 + len(rows)))


def last_needed(collator: Collator, row: Example) -> int:
    """The last position whose hidden state anybody asks for."""
    labelled = [at - 1 for at in range(1, len(row.ids)) if row.marks[at] in collator.terms]
    needed = [*labelled, row.read_at] if row.read_at >= 0 else labelled
    return max(needed, default=len(row.ids) - 1)


@quick
@given(cases())
def test_unpadding_gives_the_rows_back(case: tuple[Collator, list[Example]]) -> None:
    collator, rows = case
    batch = collated(collator, rows)
    assert batch.row_B.tolist() == list(range(10, 10 + len(rows)))
    for i, row in enumerate(rows):
        prefix_mask, live_mask = batch.prefix_mask_BP[i].bool(), batch.live_mask_BL[i].bool()
        prefix, live = batch.prefix_ids_BP[i][prefix_mask], batch.live_ids_BL[i][live_mask]
        needed = last_needed(collator, row) + 1
        assert [*prefix.tolist(), *live.tolist()] == row.ids[:needed].tolist()
        assert len(prefix) == collator.live_at(row)
        pool = [*batch.prefix_pool_BP[i][prefix_mask].tolist(), *batch.live_pool_BL[i][live_mask].tolist()]
        assert pool == np.isin(row.marks[:needed], (SPAN, FIELD)).astype(int).tolist()
        padding = [batch.prefix_ids_BP[i][~prefix_mask], batch.live_ids_BL[i][~live_mask]]
        padding += [batch.prefix_pool_BP[i][~prefix_mask], batch.live_pool_BL[i][~live_mask]]
        assert not torch.cat(padding).any()


@quick
@given(cases())
def test_padding_is_on_the_outer_sides_and_no_more_than_needed(case: tuple[Collator, list[Example]]) -> None:
    """Prefix and live part meet: `. p p | l l .`"""
    collator, rows = case
    batch = collated(collator, rows)
    assert (batch.prefix_mask_BP.diff(dim=1) >= 0).all()
    assert (batch.live_mask_BL.diff(dim=1) <= 0).all()
    assert batch.prefix_mask_BP.shape[1] == max(collator.min_prefix, int(batch.prefix_mask_BP.sum(dim=1).max()))
    assert batch.live_mask_BL.shape[1] == int(batch.live_mask_BL.sum(dim=1).max())


@quick
@given(cases())
def test_labels_are_the_next_tokens_of_the_terms(case: tuple[Collator, list[Example]]) -> None:
    """Exactly the tokens whose mark is in `terms` (but a first one, which nothing predicts), in order."""
    collator, rows = case
    batch = collated(collator, rows)
    expected = [
        (i, at - 1 - collator.live_at(row), int(row.ids[at]), int(row.marks[at]))
        for i, row in enumerate(rows)
        for at in range(1, len(row.ids))
        if row.marks[at] in collator.terms
    ]
    num_live = batch.live_ids_BL.shape[1]
    found = [
        (*divmod(int(flat), num_live), int(label), int(term))
        for flat, label, term in zip(batch.label_at_N, batch.label_N, batch.label_term_N, strict=True)
    ]
    assert found == (expected or [(0, 0, 0, -1)])
    assert all(batch.live_mask_BL[i, at] for i, at, _, _ in expected)


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
        assert not np.isin(row.marks[1 : cut + 1], collator.terms).any()
        assert 0 <= cut <= last_needed(collator, row), "at least one live position"
        needed = row.ids[cut] >= collator.first_learned_id
        needed |= cut + 1 < len(row.ids) and row.marks[cut + 1] in collator.terms
        needed |= cut in (row.read_at, len(row.ids) - 1)
        assert needed, "and no more than needed"


@quick
@given(cases())
def test_heads_read_their_own_position_and_targets_are_padded_with_nan(case: tuple[Collator, list[Example]]) -> None:
    collator, rows = case
    batch = collated(collator, rows)
    for i, row in enumerate(rows):
        if row.read_at >= 0:
            assert batch.live_ids_BL[i, batch.read_at_B[i]] == row.ids[row.read_at]
            assert batch.read_at_B[i] + collator.live_at(row) == row.read_at
        assert batch.head_B[i] == row.head
        assert batch.target_BK[i, : len(row.target)].tolist() == row.target.tolist()
        assert batch.target_BK[i, len(row.target) :].isnan().all()


@quick
@given(cases())
def test_counts(case: tuple[Collator, list[Example]]) -> None:
    collator, rows = case
    counts = count(collated(collator, rows))
    for mark, found in ((SPAN, counts.span), (OUTPUT, counts.output)):
        expected = sum(int((row.marks[1:] == mark).sum()) for row in rows) if mark in collator.terms else 0
        assert found == expected
    assert counts.value == sum(len(row.target) for row in rows)


def test_a_batch_without_labels_has_one_pad_label() -> None:
    """So that a rank without any still calls the LM head."""
    of = tiny.layout()
    batch = tiny.collator(of)([tiny.example(of, (3, "F"), np.random.default_rng(0))], [0])
    assert (batch.label_at_N.tolist(), batch.label_term_N.tolist()) == ([0], [-1])
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


@pytest.mark.parametrize("pieces", [(4, "Frozen", "~9", 3, "F", 2), (2, "F", "~2", "Learned", 1)])
def test_a_frozen_head_reads_its_own_position(pieces: tuple[Piece, ...]) -> None:
    """Text or a learned tag behind a loaded tag with a head must not move where the head reads."""
    of = tiny.layout(("Learned",))
    row = tiny.example(of, pieces, np.random.default_rng(0))
    tagged = tiny.model(of)
    full, cut = (tagged(tiny.collator(of, frozen, ())([row], [0])).values_BK for frozen in (False, True))
    torch.testing.assert_close(cut, full, rtol=1e-4, atol=1e-5)
