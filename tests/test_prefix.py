"""The frozen prefix gives what the plain full backward gives, for every family, ragged rows and memory state."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tagllm.config import BackboneConfig
from tagllm.data.batch import Counts, Tokens, count
from tagllm.data.encode import Example
from tagllm.data.layout import TagLayout
from tagllm.errors import UserError
from tagllm.model import attention, prefix
from tagllm.model.attention import plain_attention
from tagllm.model.backbone import _attention, checkpoint_layers
from tagllm.model.loss import LossWeights, total
from tagllm.model.prefix import in_passes
from tagllm.model.tagged import TaggedModel
from tagllm.template import FIELD, OUTPUT, SPAN
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("learned", [("F", "Text"), ("Learned",), ("Frozen", "F")], ids="+".join)
def test_frozen_prefix_equals_full_backward(family: str, learned: tuple[str, ...]) -> None:
    of = tiny.layout(learned)
    rows = tiny.rows(of)
    if "Learned" in learned:
        random = np.random.default_rng(1)
        prompts = (3, "Frozen", "~5", "Learned", "~4", "F"), (2, "Learned", "~6", "F"), (4, "Frozen", "~9", 3, "F")
        rows = [tiny.example(of, prompt, random) for prompt in prompts]
    tagged = tiny.model(of, family)
    found = {}
    for frozen in (False, True):
        batch = tiny.collator(of, frozen, (SPAN, OUTPUT))(rows)
        loss, output = tiny.loss_of(tagged, batch)
        loss.backward()
        found[frozen] = (loss.item(), tiny.gradients(tagged), output.values_BK, output.mean_BD.detach())
    full, cut = found[False], found[True]
    assert cut[0] == pytest.approx(full[0], rel=1e-5)
    assert full[1]["tags.learned_TD"].norm() > 0 and cut[1].keys() == full[1].keys()
    for name, gradient in full[1].items():
        if gradient.norm() > 0:
            assert tiny.relative_error(cut[1][name], gradient) < 1e-5, name
    torch.testing.assert_close(cut[2], full[2], rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(cut[3], full[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 30, 1 << 30])
@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_remembered_prefix_changes_nothing(budget: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the memory, and in whatever company a row was first computed."""
    monkeypatch.setattr(prefix, "POSITIONS_AT_ONCE", at_once)
    of = tiny.layout()
    rows = tiny.rows(of)
    plain, remembering = tiny.model(of), tiny.model(of, remember=budget)
    collate = tiny.collator(of)
    for chosen in ([0, 1, 2], [2, 1, 0], [3, 4, 0, 5], [6, 5, 2, 1], [0, 1, 2, 3, 4, 5, 6]):
        batch = collate([rows[i] for i in chosen])
        found = []
        for tagged in (plain, remembering):
            loss, output = tiny.loss_of(tagged, batch)
            loss.backward()
            found.append((loss.item(), tiny.gradients(tagged), output.prefix_last_BD))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in found[0][1].items():
            assert tiny.relative_error(found[1][1][name], gradient) < 1e-5, name
        torch.testing.assert_close(found[1][2], found[0][2])
    assert remembering.memory is not None
    assert remembering.memory.hits > 0
    assert remembering.memory.used_host <= budget


def test_a_gpu_takes_as_many_stretches_as_their_scores_leave_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 heads and 10 shared keys: 4 x 4 x 6 x 16 bytes for a stretch of 6. What is longer goes by itself."""
    tokens = Tokens(torch.zeros(4, 41, dtype=torch.long, device="meta"), (2, 6, 20, 5, 0, 6, 2), spans=False)
    for limit, passes in (
        (1 << 30, [[0, 1, 2, 3, 4, 5, 6]]),
        (2 * 4 * 4 * 6 * 16, [[2], [1, 5], [0, 3], [4, 6]]),
        (1, [[2], [1], [5], [3], [0], [6], [4]]),
    ):
        monkeypatch.setattr(prefix, "SCORE_BYTES", limit)
        assert in_passes(tokens, range(7), heads=4, keys_before=10) == passes


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_in_parts_equals_the_backbones_own(family: str) -> None:
    """Losses and gradients as transformers gives them for one row, inputs put together by hand."""
    of = tiny.layout(("Text",))
    row = tiny.rows(of)[2]
    tagged = tiny.model(of, family)
    loss, _ = tiny.loss_of(tagged, tiny.collator(of)([row]))
    loss.backward()
    learned = tagged.tags.learned_TD
    ours, learned.grad = learned.grad, None
    labels = torch.tensor([[t if m == OUTPUT else -100 for t, m in zip(row.ids, row.marks, strict=True)]])
    with plain_attention(tagged.backbone):
        embeddings = tagged.tags(tagged.backbone.get_input_embeddings(), torch.tensor(row.ids).long()[None])
        expected = tagged.backbone(inputs_embeds=embeddings, labels=labels).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours is not None and learned.grad is not None
    assert tiny.relative_error(ours, learned.grad) < 1e-5


def test_nothing_of_the_prefix_is_in_the_graph() -> None:
    """What is saved for backward grows with the prefix by no more than its keys and values in each layer, and a mark of
    each position for each row of the tag."""
    of = tiny.layout()
    tagged, collate = tiny.model(of), tiny.collator(of)

    def saved_bytes(length: int) -> int:
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        row = tiny.example(of, (f"~{length}", "F"), np.random.default_rng(0))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            tagged(collate([row]))
        return sum(saved.values())

    config, more = tagged.backbone.config, 180
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    scores = config.num_hidden_layers * config.num_attention_heads * len(of.ids("F")) * 4 * 2
    assert saved_bytes(20 + more) - saved_bytes(20) <= more * (keys_and_values + scores)


def test_padding_does_not_matter() -> None:
    """A row alone and the same row among longer ones give the same values."""
    of = tiny.layout()
    rows = tiny.rows(of)
    tagged = tiny.model(of)
    collate = tiny.collator(of)
    together = tagged(collate(rows)).values_BK
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            tagged(collate([row])).values_BK[0], together[i], rtol=1e-4, atol=1e-5, equal_nan=True
        )


def test_a_row_without_a_prefix_joins_remembered_ones() -> None:
    of = tiny.layout(("F", "Learned"))
    first, none = tiny.rows(of)[0], tiny.rows(of)[3]
    assert none.function_at == 0
    collate, tagged = tiny.collator(of), tiny.model(of, remember=1 << 24)
    tagged(collate([first]))
    expected = tiny.model(of)(collate([first, none])).values_BK
    torch.testing.assert_close(tagged(collate([first, none])).values_BK, expected, equal_nan=True)


SHARED = [
    ("~20#1", "~6", 2, "F"),
    ("~20#1", "~9", 2, "F"),
    ("~12#2", "~9", 2, "Text", ">4"),
    ("~20#1", "~3", 2, "Text", ">2"),
    ("~12#2", "~5", 2, "F"),
]


def grouped_rows(of: TagLayout, group: bool) -> list[Example]:
    """A protein in the first span, a drug in the second; groups 1 and 2 interleaved."""
    random = np.random.default_rng(3)
    return [
        tiny.example(of, (3, "Frozen", first, 2, "Frozen", *rest), random, group=int(first[-1]) if group else -1)
        for first, *rest in SHARED
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("grouped", [False, True], ids=["by chance", "by group"])
@pytest.mark.parametrize("sharded", [False, True], ids=["", "sharded"])
def test_shared_beginnings_change_nothing(family: str, grouped: bool, sharded: bool) -> None:
    """Computed once, by content: two different proteins and 39 positions of drugs and text, instead of 129."""
    of = tiny.layout(("F", "Text"))
    rows = grouped_rows(of, grouped)
    tagged = tiny.model(of, family)
    together = tiny.collator(of, grouped=grouped, sharded=sharded)(rows)
    if grouped or not sharded:
        assert len(together.pieces.keys) == 2
        assert sum(together.pieces.tokens.lengths) + sum(together.own.lengths) < 0.7 * sum(together.prefix_lengths)
    loss, output = tiny.loss_of(tagged, together)
    loss.backward()
    shared = tiny.gradients(tagged)
    weights_of = [tiny.collator(of, frozen=False)([row]) for row in rows]
    counts = count(tiny.collator(of)(rows))
    values = []
    for alone in weights_of:
        single = tagged(alone)
        total(single.sums, counts, LossWeights(1.0, 1.0, 1.0)).backward()
        values.append(single.values_BK)
    for name, gradient in tiny.gradients(tagged).items():
        assert tiny.relative_error(shared[name], gradient) < 1e-5, name
    torch.testing.assert_close(output.values_BK, torch.cat(values), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("block", [False, True], ids=["causal", "block"])
def test_in_how_many_passes_shared_beginnings_are_computed_changes_nothing(
    family: str, block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = tiny.layout(("F", "Text"))
    batch = tiny.collator(of, block=block)(grouped_rows(of, group=False))
    found = []
    for at_once in (1 << 30, 12):
        monkeypatch.setattr(prefix, "POSITIONS_AT_ONCE", at_once)
        tagged = tiny.model(of, family, remember=1 << 24)
        loss, output = tiny.loss_of(tagged, batch)
        loss.backward()
        found.append((output, tiny.gradients(tagged)))
    (together, gradients), (apart, gradients_apart) = found
    for values in ("values_BK", "mean_BD", "prefix_last_BD"):
        torch.testing.assert_close(
            getattr(apart, values), getattr(together, values), rtol=1e-4, atol=1e-5, equal_nan=True
        )
    for name, gradient in gradients.items():
        assert tiny.relative_error(gradients_apart[name], gradient) < 1e-5, name


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("free", [False, True], ids=["in place", "free spans"])
@pytest.mark.parametrize("learned", [("F", "Text"), ("Frozen", "F", "Text")], ids="+".join)
def test_block_mask_equals_a_plain_backward_under_the_block_mask(
    family: str, free: bool, learned: tuple[str, ...]
) -> None:
    """transformers' own attention with that mask, as its rule says (test_masks has it drawn), one row at a time."""
    if family == "gemma2":
        pytest.skip("transformers takes one mask for all layers; its sliding layers need another")
    of = tiny.layout(learned)
    rows = grouped_rows(of, group=False)
    tagged = tiny.model(of, family)
    collate = tiny.collator(of, block=True, free_spans=free and tagged.rotation is not None)
    if free and family != "gpt2":
        assert tagged.rotation is not None
        if "Frozen" not in learned:
            assert len(collate(rows).pieces.keys) == 7, "two proteins and five drugs"
    loss, _ = tiny.loss_of(tagged, collate(rows))
    loss.backward()
    ours = tiny.gradients(tagged)
    expected = []
    for row in rows:
        mask = torch.tensor(block_mask(row))
        with plain_attention(tagged.backbone):
            hidden_SD = tagged.backbone.base_model(
                inputs_embeds=tagged.tags(tagged.backbone.get_input_embeddings(), torch.tensor(row.ids).long()[None]),
                attention_mask=mask[None, None],
                position_ids=torch.arange(len(row.ids))[None],
            ).last_hidden_state[0]
        expected.append((row, hidden_SD))
    reference = plain_loss(tagged, expected, count(collate(rows)))
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for name, gradient in tiny.gradients(tagged).items():
        assert tiny.relative_error(ours[name], gradient) < 2e-5, name


def block_mask(row: Example) -> list[list[bool]]:
    span_of = np.zeros(len(row.ids), int)
    for number, (start, end) in enumerate(row.spans_at, 1):
        span_of[start:end] = number
    places = range(len(row.ids))
    return [[key <= query and span_of[query] in (0, span_of[key]) for key in places] for query in places]


def plain_loss(tagged: TaggedModel, rows: list[tuple[Example, torch.Tensor]], counts: Counts) -> torch.Tensor:
    """Cross entropy of the output tokens and squared error of the head, written out."""
    loss = torch.zeros(())
    for row, hidden_SD in rows:
        at = np.flatnonzero(row.marks[1:] == OUTPUT)
        logits = tagged.backbone.get_output_embeddings()(hidden_SD[at])
        loss = loss + functional.cross_entropy(logits, torch.tensor(row.ids[at + 1]).long(), reduction="sum") / max(
            counts.output, 1
        )
        if row.read_at >= 0:
            head = tagged.heads["F"]
            pooled = np.isin(row.marks, (SPAN, FIELD)) & (np.arange(len(row.ids)) <= row.read_at)
            answer = head(hidden_SD[row.read_at][None], hidden_SD[pooled].mean(dim=0)[None])[0]
            loss = loss + ((answer - head.standardise(torch.tensor(row.target))) ** 2).sum() / counts.value
    return loss


def test_a_free_span_is_computed_once_wherever_it_stands() -> None:
    """Under the block mask the same protein, introduced in the same words, is remembered from before whatever stands in
    front of them, and its values stay right."""
    of = tiny.layout()
    random = np.random.default_rng(0)
    rows = [tiny.example(of, (f"~{size}", 4, "Frozen", "~15#1", 2, "F"), random) for size in (3, 7, 40)]
    tagged, plain = tiny.model(of, remember=1 << 24), tiny.model(of)
    assert tagged.memory is not None
    for seen_before, row in enumerate(rows):
        batch = tiny.collator(of, block=True, free_spans=True)([row])
        expected = plain(tiny.collator(of, block=True)([row])).values_BK
        torch.testing.assert_close(tagged(batch).values_BK, expected, rtol=1e-4, atol=1e-5)
        assert tagged.memory.hits == seen_before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing_changes_nothing_but_memory(family: str) -> None:
    of = tiny.layout(("F", "Text"))
    batch = tiny.collator(of)(tiny.rows(of))
    found = []
    for checkpointed in (False, True):
        tagged = tiny.model(of, family)
        if checkpointed:
            checkpoint_layers(tagged.backbone)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_noted, saved), lambda t: t):
            loss, _ = tiny.loss_of(tagged, batch)
        num_bytes = sum({t.untyped_storage().data_ptr(): t.nbytes for t in saved}.values())
        loss.backward()
        found.append((tiny.gradients(tagged), num_bytes))
    for name, gradient in found[0][0].items():
        assert tiny.relative_error(found[1][0][name], gradient) < 1e-6, name
    assert found[1][1] < 0.8 * found[0][1]


def _noted(saved: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    saved.append(tensor)
    return tensor


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("block", [False, True], ids=["causal", "block"])
def test_rows_do_not_see_each_other(family: str, block: bool) -> None:
    """Rows stand behind each other in one sequence: another row in the middle leaves the losses of the others alone."""
    of = tiny.layout(("Learned",))
    random = np.random.default_rng(0)
    first, second, other, last = (
        tiny.example(of, (2, "Frozen", "~4#1", 1, "Learned", f"~{size}"), random) for size in (9, 5, 5, 7)
    )
    tagged = tiny.model(of, family)
    collate = tiny.collator(of, terms=(SPAN,), block=block)
    nats = [tagged(collate([first, row, last])).token_loss_M.split([4 + 9, 4 + 5, 4 + 7]) for row in (second, other)]
    assert not torch.allclose(nats[0][1], nats[1][1])
    for before, after in zip(nats[0][::2], nats[1][::2], strict=True):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


def test_flash_attn_gets_no_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 weights a live pass computes attention in fp32, which flash-attn refuses; prefix passes go to it."""
    of = tiny.layout()
    seen_dtypes: list[torch.dtype] = []

    def flash(
        tokens: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        seen_dtypes.extend(t.dtype for t in (query, key, value))
        return torch.zeros_like(query).transpose(1, 2)

    monkeypatch.setattr(attention, "_flash", flash)
    tagged = tiny.model(of, dtype=torch.bfloat16)
    tagged.attention = "flash_attention_2"
    for frozen in (False, True):
        loss, _ = tiny.loss_of(tagged, tiny.collator(of, frozen)(tiny.rows(of)[:1]))
        loss.backward()
    assert set(seen_dtypes) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"cute/__init__.py": ""}, "cannot import name 'flash_attn_varlen_func'"),
        ({"__init__.py": "raise ImportError('undefined symbol: _ZN3c105ErrorE')"}, "undefined symbol: _ZN3c105ErrorE"),
    ],
    ids=["flash-attn 4", "of another torch"],
)
def test_flash_attn_that_cannot_be_imported_is_not_chosen(
    files: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / "flash_attn" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flash_attn" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    asked = torch.device("cuda"), torch.bfloat16
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    assert _attention(BackboneConfig(model="m"), *asked) == "sdpa"
    with pytest.raises(UserError, match=f"needs the package flash-attn, which says: {told}"):
        _attention(BackboneConfig(model="m", attention="flash_attention_2"), *asked)
    sys.modules.pop("flash_attn", None)


def test_heads_of_a_group_spread_out_are_the_same_attention() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)]
    states = [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]
    query, key, value = states
    grouped = attention.causal(query, key, value, 0.3)
    spread = attention.causal(query, *(attention.spread_over_heads(t, 6) for t in (key, value)), 0.3)
    torch.testing.assert_close(spread, grouped, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(grouped.shape, generator=random)
    found, expected = (torch.autograd.grad(out, states, upstream) for out in (spread, grouped))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_keeps_no_scores_of_groups_of_heads_in_fp32() -> None:
    """The only other kernel for them keeps rows x heads x positions x positions in each layer."""
    of = tiny.layout()
    tagged = tiny.model(of).cuda()
    batch = tiny.collator(of, frozen=False)(tiny.rows(of)[:1]).to(torch.device("cuda"))
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION]):
        tiny.loss_of(tagged, batch)[0].backward()


def test_beginnings_that_differ_in_their_spans_alone_are_two() -> None:
    """The same tokens and tags, of which one prompt has the last inside of a span."""
    of = tiny.layout()
    long = tiny.example(of, (3, "Frozen", "~9#1", 4, "Frozen", "~8", 2, "F"), np.random.default_rng(0))
    ends = long.spans_at[1]
    cut = np.r_[0 : ends[1] - 8, ends[1] + 2 : len(long.ids)]  # without the second field and the text behind it
    short = long._replace(
        ids=long.ids[cut],
        marks=long.marks[cut],
        pools=long.pools[cut],
        spans_at=long.spans_at[:1],
        read_at=long.read_at - 10,
        function_at=long.function_at - 10,
        fields_at=long.fields_at[:1],
    )
    tagged, collate = tiny.model(of, "gpt2"), tiny.collator(of, block=True)
    together = tagged(collate([long, short])).values_BK
    for row, example in enumerate((long, short)):
        torch.testing.assert_close(together[row], tagged(collate([example])).values_BK[0], rtol=1e-5, atol=1e-6)
