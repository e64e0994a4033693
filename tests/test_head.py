"""Heads learn on standardised features; what is saved reads hidden states as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tagllm.config import HeadConfig
from tagllm.head import Head
from tagllm.model.value_head import HeadModule
from tagllm.tags import TagLibrary
from tests import tiny
from tests.commands import Run, config, fails


def head_of(seed: int, outputs: int) -> HeadModule:
    random = torch.Generator().manual_seed(seed)
    blank = Head.new(HeadConfig(reads="both", outputs=outputs), tiny.HIDDEN)
    weight_KF = torch.randn(blank.weight_KF.shape, generator=random)
    return HeadModule(Head(blank.spec, weight_KF, torch.randn(outputs, generator=random), blank.mean_K, blank.std_K))


@given(st.integers(0, 1000), st.integers(1, 3))
def test_another_scale_gives_the_same_answers(seed: int, outputs: int) -> None:
    head = head_of(seed, outputs)
    last_nD, mean_nD = (torch.randn(2, 9, tiny.HIDDEN) * torch.rand(tiny.HIDDEN) + 3 * torch.randn(tiny.HIDDEN)) * 10
    before, raw = head(last_nD, mean_nD).detach(), head.folded(head.weight_KF.data, head.bias_K.data)
    head.set_scale_of(mean_nD)
    head.weight_KF.data, head.bias_K.data = head.unfolded(*raw)
    torch.testing.assert_close(head(last_nD, mean_nD).detach(), before, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(head.folded(head.weight_KF.data, head.bias_K.data)[0], raw[0], rtol=1e-4, atol=1e-5)


def test_a_mean_that_never_differs_does_no_harm() -> None:
    """Not in these rows, nor in one where it differs, after steps on them."""
    head = head_of(0, 1)
    head.weight_KF.data.zero_()
    last_nD, mean_nD = torch.randn(2, 9, tiny.HIDDEN)
    mean_nD[:, 3] = 7.1
    head.set_scale_of(mean_nD)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(20):
        loss = ((head(last_nD, mean_nD) - last_nD[:, :1]) ** 2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    other_nD = mean_nD + 2.0 * torch.nn.functional.one_hot(torch.tensor(3), tiny.HIDDEN)
    assert (head(last_nD, other_nD) - head(last_nD, mean_nD)).abs().max() < 1.0


def test_what_is_saved_reads_means_as_they_are(run: Run, folder: Path) -> None:
    """Eval knows nothing of the scale that training used, and scores what training scored."""
    tags = {"W": {"kind": "function", "length": 2, "head": {"reads": "both", "refit": False}}}
    file = config(folder, "scaled", tags=tags, optim__head_lr=0.1, optim__steps=6)
    assert run("train", file).exit_code == 0
    assert run("eval", folder / "runs/scaled", "--split", "valid").exit_code == 0
    logged = [json.loads(line) for line in (folder / "runs/scaled/metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "runs/scaled/valid/results.json").read_text())
    assert results["metrics"]["mse"] == pytest.approx(min(line.get("valid/mse", 9e9) for line in logged), rel=1e-4)


def test_a_loaded_head_goes_on_from_what_it_knew(run: Run, folder: Path) -> None:
    tags = {"W": {"kind": "function", "length": 2, "head": {"reads": "both"}}}
    assert run("train", config(folder, "knows", tags=tags)).exit_code == 0
    before = TagLibrary.load(folder / "runs/knows/library").tags["W"].head
    more = {"W": {"load": "runs/knows/library", "learn": True}}
    file = config(folder, "goes-on", tags=more, optim__tag_lr=1e-12, optim__head_lr=1e-12)
    assert run("train", file).exit_code == 0
    after = TagLibrary.load(folder / "runs/goes-on/last").tags["W"].head
    assert before is not None and after is not None
    torch.testing.assert_close(after.weight_KF, before.weight_KF, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after.bias_K, before.bias_K, rtol=1e-2, atol=1e-3)


def test_a_tag_goes_on_with_the_rows_it_learned_from_alone(run: Run, folder: Path) -> None:
    """Drawn with another seed, rows to test are rows that it was trained on."""
    assert run("train", config(folder, "first")).exit_code == 0
    more = {"W": {"load": "runs/first/library", "learn": True}}
    other = config(folder, "other-rows", tags=more, data__split={"seed": 1})
    fails(
        run("train", other),
        "data.sources.0",
        "those that <W> was trained on",
        "Set source.path and source.split as they were",
    )
    assert run("train", config(folder, "same-rows", tags=more)).exit_code == 0
    first, second = (TagLibrary.load(folder / f"runs/{name}/library").tags["W"] for name in ("first", "same-rows"))
    assert first.about["held_out"] == second.about["held_out"]
