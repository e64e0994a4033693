"""Losses and gradients of the authors' released code, and our own tiny reference for where that is not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from tagllm.config import HeadConfig
from tagllm.data.batch import count
from tagllm.data.collate import Collator
from tagllm.data.encode import Example
from tagllm.data.layout import TagLayout
from tagllm.head import Head
from tagllm.model.attention import plain_attention
from tagllm.model.frozen import make_frozen_aware
from tagllm.model.loss import LossWeights
from tagllm.model.tagged import TaggedModel
from tagllm.tags import Tag
from tagllm.template import OUTPUT, SPAN, TAG, TEXT
from tests import tiny
from tests.test_prefix import block_mask

REFERENCE = Path(__file__).parents[2] / "shared" / "parity" / "reference.safetensors"
CASES = {"domain_lm": ("A", "B"), "function_regression": ("F",), "function_text": ("F",)}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    if not REFERENCE.is_file():
        pytest.skip("the authors' numbers (shared/parity) are not beside this checkout")
    with safe_open(REFERENCE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def build(reference: dict[str, torch.Tensor], learned: tuple[str, ...]) -> TaggedModel:
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        rms_norm_eps=1e-6, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    llama: Any = LlamaForCausalLM(config)
    llama.load_state_dict({n.removeprefix("backbone."): t for n, t in reference.items() if n.startswith("backbone.")})
    spec = HeadConfig()
    head = Head(spec, reference["head"], torch.zeros(1), torch.zeros(1), torch.ones(1))
    kinds = {"A": "domain", "B": "domain", "F": "function"}
    rows = dict(zip("ABF", reference["tags"].split(5), strict=False))
    made = {n: Tag(n, kinds[n], rows[n], head if n == "F" else None) for n in kinds}
    # The reference numbers its rows A, B, F; with A and B learned or frozen together the layout does too.
    layout = TagLayout.of(320, kinds, dict.fromkeys(kinds, 5), learned, {"F": spec})
    make_frozen_aware(llama.eval().requires_grad_(False))
    return TaggedModel(llama, made, layout)


def examples(reference: dict[str, torch.Tensor], case: str, layout: TagLayout) -> list[Example]:
    """The reference's rows in our layout: same tags, renumbered, padding dropped."""
    made = []
    theirs = {320 + 5 * i + row: name for i, name in enumerate("ABF") for row in range(5)}
    for i, mask in enumerate(reference[f"{case}.in.attention_mask"].bool()):
        ids = reference[f"{case}.in.input_ids"][i][mask].tolist()
        labels = reference[f"{case}.in.labels"][i][mask].tolist()
        ids = [layout.ids(theirs[t])[(t - 320) % 5] if t in theirs else t for t in ids]
        marks = [TAG if t >= 320 else TEXT if label == -100 else SPAN for t, label in zip(ids, labels, strict=True)]
        regression = case == "function_regression"
        target = reference[f"{case}.in.label_reg"][i : i + 1].numpy() if regression else np.zeros(0, np.float32)
        read_at = len(ids) - 4 if regression else -1
        columns = np.array(ids, np.int32), np.array(marks, np.uint8), np.zeros(len(ids), np.uint8)
        made.append(Example(*columns, target, 0 if regression else -1, read_at, 0, 0))
    return made


@pytest.mark.parametrize("case", ["function_regression", "function_text"])
def test_the_authors_gradients_through_a_frozen_prefix(reference: dict[str, torch.Tensor], case: str) -> None:
    """Text in front of the tag has no gradient in it; theirs only counts it in the mean over tokens."""
    tagged = build(reference, CASES[case])
    rows = examples(reference, case, tagged.layout)
    labelled = sum(int((row.marks[1:] == SPAN).sum()) for row in rows)  # nothing predicts the first
    function = tagged.layout.ids("F").start
    for row in rows:
        behind = np.arange(len(row.ids)) > np.flatnonzero(row.ids == function)[0]
        row.marks[row.marks == SPAN] = np.where(behind, OUTPUT, TEXT)[row.marks == SPAN]
    batch = Collator(tagged.layout.first_learned_id, (OUTPUT,), 1, True)(rows)
    assert all(batch.prefix_lengths), "computed without a graph"
    loss, _ = tiny.loss_of(tagged, batch, LossWeights(1.0, 1.0, 100.0))
    loss.backward()
    found = tagged.tags.learned_TD.grad
    assert found is not None
    share = count(batch).output / labelled if case == "function_text" else 1.0
    assert tiny.relative_error(found * share, reference[f"{case}.tag_grad"][-len(found) :]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_authors_losses_and_gradients(reference: dict[str, torch.Tensor], case: str) -> None:
    tagged = build(reference, CASES[case])
    layout = tagged.layout
    rows = examples(reference, case, layout)
    batch = Collator(layout.first_learned_id, (SPAN, OUTPUT), 1, frozen_prefix=False)(rows)
    loss, _ = tiny.loss_of(tagged, batch, LossWeights(1.0, 1.0, 100.0))
    loss.backward()
    assert loss.item() == pytest.approx(reference[f"{case}.loss"].item(), rel=1e-5)
    gradient = tagged.tags.learned_TD.grad
    assert gradient is not None
    expected = reference[f"{case}.tag_grad"]
    assert tiny.relative_error(gradient, expected[-len(gradient) :]) < 1e-5
    if case == "function_regression":
        head = tagged.heads["F"].weight_KF.grad
        assert head is not None
        assert tiny.relative_error(head, reference[f"{case}.head_grad"]) < 1e-5


@pytest.mark.parametrize("free", [False, True], ids=["in place", "free spans"])
@pytest.mark.parametrize("case", ["function_regression", "function_text"])
def test_the_authors_block_mask(reference: dict[str, torch.Tensor], case: str, free: bool) -> None:
    """Their weights, tags and rows under the mask they describe: tag A and what follows it up to B see only each other,
    so do B and what follows it up to F. Against transformers' own LLaMA with that mask written out."""
    tagged = build(reference, CASES[case])
    domain = [list(tagged.layout.ids(name)) for name in "AB"]
    function = tagged.layout.ids("F").start
    rows = []
    for row in examples(reference, case, tagged.layout):
        starts = [int(np.flatnonzero(row.ids == ids[0])[0]) for ids in domain if ids[0] in row.ids]
        ends = [*starts[1:], int(np.flatnonzero(row.ids == function)[0])]
        rows.append(row._replace(spans_at=np.array(list(zip(starts, ends, strict=True)), np.int32).reshape(-1, 2)))
    collate = Collator(tagged.layout.first_learned_id, (OUTPUT,), 1, block=True, free_spans=free)
    assert sum(map(len, (row.spans_at for row in rows)))
    direction_D = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for row in rows:
        tagged.zero_grad()
        output = tagged(collate([row]))
        (output.last_BD[0] * direction_D).sum().backward()
        ours = tagged.tags.learned_TD.grad
        assert ours is not None
        tagged.zero_grad()
        with plain_attention(tagged.backbone):
            hidden_SD = tagged.backbone.base_model(
                inputs_embeds=tagged.tags(tagged.backbone.get_input_embeddings(), torch.tensor(row.ids).long()[None]),
                attention_mask=torch.tensor(block_mask(row))[None, None],
            ).last_hidden_state[0]
        expected = hidden_SD[max(row.read_at, collate.live_at(row))]
        (expected * direction_D).sum().backward()
        theirs = tagged.tags.learned_TD.grad
        assert theirs is not None
        torch.testing.assert_close(output.last_BD[0], expected, rtol=1e-5, atol=1e-5)
        assert tiny.relative_error(ours, theirs) < 1e-5


def test_against_plain_transformers() -> None:
    """Our own reference: embeddings put together by hand, HF's own loss, torch autograd."""
    of = tiny.layout(("F", "Text"))
    tagged = tiny.model(of)
    row = tiny.rows(of)[2]
    batch = tiny.collator(of)([row])
    loss, _ = tiny.loss_of(tagged, batch)
    loss.backward()
    rows_TD = torch.cat([tagged.tags.frozen_TD, tagged.tags.learned_TD]).detach().requires_grad_()
    table = torch.cat([tagged.backbone.get_input_embeddings().weight, rows_TD])
    labels = torch.tensor([[t if m == OUTPUT else -100 for t, m in zip(row.ids, row.marks, strict=True)]])
    with plain_attention(tagged.backbone):
        expected = tagged.backbone(inputs_embeds=table[torch.tensor(row.ids).long()][None], labels=labels).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert rows_TD.grad is not None and tagged.tags.learned_TD.grad is not None
    num_learned = len(tagged.tags.learned_TD)
    assert tiny.relative_error(tagged.tags.learned_TD.grad, rows_TD.grad[-num_learned:]) < 1e-5
