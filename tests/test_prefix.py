"""The frozen prefix gives what the plain full backward gives, for every family, ragged rows and memory state."""

from __future__ import annotations

import pytest
import torch

from tagllm.template import OUTPUT, SPAN
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("learned", [("F", "Text"), ("Learned",), ("Frozen", "F")], ids="+".join)
def test_frozen_prefix_equals_full_backward(family: str, learned: tuple[str, ...]) -> None:
    of = tiny.layout(learned)
    rows = tiny.rows(of)
    if "Learned" in learned:
        rows = [row for row in rows if row.function_at > 0][:3]
    tagged = tiny.model(of, family)
    found = {}
    for frozen in (False, True):
        batch = tiny.collator(of, frozen, (SPAN, OUTPUT))(rows, range(len(rows)))
        loss, output = tiny.loss_of(tagged, batch)
        loss.backward()
        found[frozen] = (loss.item(), tiny.gradients(tagged), output.values_BK, output.mean_BD.detach())
    full, cut = found[False], found[True]
    assert cut[0] == pytest.approx(full[0], rel=1e-5)
    for name, gradient in full[1].items():
        if gradient.norm() > 0:
            assert tiny.relative_error(cut[1][name], gradient) < 1e-5, name
    torch.testing.assert_close(cut[2], full[2], rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(cut[3], full[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_remembered_prefix_changes_nothing(budget: int) -> None:
    """Whatever is in the memory, and in whatever company a row was first computed."""
    of = tiny.layout()
    rows = tiny.rows(of)
    plain, remembering = tiny.model(of), tiny.model(of, remember=budget)
    collate = tiny.collator(of)
    for chosen in ([0, 1, 2], [2, 1, 0], [3, 4, 0, 5], [6, 5, 2, 1], [0, 1, 2, 3, 4, 5, 6]):
        batch = collate([rows[i] for i in chosen], chosen)
        found = []
        for tagged in (plain, remembering):
            loss, output = tiny.loss_of(tagged, batch)
            loss.backward()
            found.append((loss.item(), tiny.gradients(tagged), output.prefix_last_BD))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in found[0][1].items():
            assert tiny.relative_error(found[1][1][name], gradient) < 1e-5, name
        torch.testing.assert_close(
            found[1][2][batch.prefix_mask_BP.any(dim=1)], found[0][2][batch.prefix_mask_BP.any(dim=1)]
        )
    assert remembering.memory is not None
    assert remembering.memory.hits > 0
    assert remembering.memory.num_bytes <= budget


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_two_part_attention_equals_the_backbones_own(family: str) -> None:
    """Values, losses and gradients as with the attention that transformers chooses for the family."""
    of = tiny.layout()
    rows = tiny.rows(of)
    batch = tiny.collator(of)(rows, range(len(rows)))
    own, ours = tiny.model(of, family), tiny.model(of, family)
    own.backbone.set_attn_implementation(tiny.backbone(family).config._attn_implementation)
    own.two_part = False
    assert ours.two_part
    found = []
    for tagged in (own, ours):
        loss, output = tiny.loss_of(tagged, batch)
        loss.backward()
        found.append((loss.item(), output.values_BK, tiny.gradients(tagged)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5, equal_nan=True)
    for name, gradient in found[0][2].items():
        assert tiny.relative_error(found[1][2][name], gradient) < 1e-5, name


def test_nothing_of_the_prefix_is_in_the_graph() -> None:
    """Saved tensors of the live pass do not grow with the prefix, but for its keys and values."""
    of = tiny.layout()
    row = tiny.rows(of)[0]
    tagged = tiny.model(of)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        tagged.encode_prefix(tiny.collator(of)([row], [0]))
    assert saved == []


def test_padding_does_not_matter() -> None:
    """A row alone and the same row among longer ones give the same values."""
    of = tiny.layout()
    rows = tiny.rows(of)
    tagged = tiny.model(of)
    collate = tiny.collator(of)
    together = tagged(collate(rows, range(len(rows)))).values_BK
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            tagged(collate([row], [i])).values_BK[0], together[i], rtol=1e-4, atol=1e-5, equal_nan=True
        )
