"""What heads read of fields, in whatever way a row is computed: means behind several layers, and lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tagllm.config import HeadConfig
from tagllm.data.layout import TagLayout
from tagllm.model.backbone import checkpoint_layers
from tagllm.tags import TagLibrary
from tests import tiny
from tests.commands import Run, config, fails

LAYERS = (0, 1, 2)
PROMPTS: list[tuple[str | int, ...]] = [
    (4, "Frozen", "~9", "Frozen", "~4", 3, "F"),
    (4, "Learned", "~5", "Frozen", "~7", 2, "F"),
    ("Learned", "~3", 2, "F"),
]
LENGTHS = [[9, 4], [5, 7], [3, 0]]
SETTINGS: list[dict[str, Any]] = [{}, {"frozen": False}, {"block": True}, {"block": True, "free_spans": True}]


def layout(*layers: int, pool: str = "together", learned: tuple[str, ...] = ("F",), lengths: bool = False) -> TagLayout:
    spec = HeadConfig(reads="both", outputs=2, layers=list(layers), pool=pool, lengths=lengths)
    pools = (0, 1) if pool == "apart" else (0,)
    return TagLayout.of(tiny.VOCABULARY, tiny.KINDS, dict.fromkeys(tiny.KINDS, 3), learned, {"F": spec}, pools)


def means(of: TagLayout, family: str, settings: dict[str, Any], remember: int = 0) -> torch.Tensor:
    """(rows, layers and then lengths, pools, D)."""
    model, random = tiny.model(of, family, remember=remember), np.random.default_rng(0)
    rows = [tiny.example(of, prompt, random) for prompt in PROMPTS]
    collate = tiny.collator(of, **settings)
    for batch in (collate(rows[:1]), collate(rows)):  # what is remembered of the first serves the second
        output = model(batch)
    return output.mean_BD.detach().view(len(rows), -1, of.num_pools, tiny.HIDDEN)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("pool", ["together", "apart"])
def test_they_are_the_means_of_what_transformers_gives(family: str, settings: dict[str, Any], pool: str) -> None:
    of = layout(*LAYERS, pool=pool)
    found = means(of, family, settings)
    plain, model, random = tiny.plain_backbone(family), tiny.model(of, family), np.random.default_rng(0)
    for row, prompt in enumerate(PROMPTS):
        example = tiny.example(of, prompt, random)
        ids = torch.from_numpy(example.ids.astype(np.int64))
        embeds = model.tags(model.backbone.get_input_embeddings(), ids[None], torch.float32)
        states = plain(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        for pool_at in range(of.num_pools):
            inside = torch.from_numpy(example.pools == pool_at + 1)
            for at, layer in enumerate(LAYERS):
                expected = states[layer][0][inside].mean(dim=0).nan_to_num().detach()
                torch.testing.assert_close(found[row, at, pool_at], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
@pytest.mark.parametrize("remember", [0, 1 << 24])
def test_each_is_what_it_is_alone(settings: dict[str, Any], remember: int) -> None:
    together = means(layout(*LAYERS, pool="apart"), "llama", settings, remember)
    for at, layer in enumerate(LAYERS):
        alone = means(layout(layer, pool="apart"), "llama", settings)
        torch.testing.assert_close(together[:, at : at + 1], alone, rtol=1e-4, atol=1e-5)
    last = means(layout(pool="apart"), "llama", settings)
    torch.testing.assert_close(together[:, -1:], last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("pool", ["together", "apart"])
def test_lengths_stand_beside_the_means(settings: dict[str, Any], pool: str) -> None:
    found = means(layout(0, 1, pool=pool, lengths=True), "llama", settings, remember=1 << 24)
    torch.testing.assert_close(found[:, :2], means(layout(0, 1, pool=pool), "llama", settings))
    lengths = torch.tensor(LENGTHS if pool == "apart" else [[sum(row)] for row in LENGTHS])
    torch.testing.assert_close(found[:, 2, :, 0], lengths.float().log1p())
    assert not found[:, 2, :, 1:].any()


def test_the_gradient_is_that_of_the_whole_prompt() -> None:
    of = layout(0, 1, pool="apart", learned=("Learned", "F"), lengths=True)
    rows = [tiny.example(of, prompt, np.random.default_rng(1)) for prompt in PROMPTS]
    found = []
    for frozen, checkpointed in ((False, False), (True, False), (True, True)):
        model = tiny.model(of)
        if checkpointed:
            checkpoint_layers(model.backbone)
        tiny.loss_of(model, tiny.collator(of, frozen=frozen)(rows))[0].backward()
        found.append(tiny.gradients(model))
    expected, *others = found
    for gradients in others:
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert tiny.relative_error(gradients[name], gradient) <= 1e-5, name


HEAD = {"type": "regression", "reads": "both", "layers": [0, 1], "lengths": True, "kernel": "anova"}


@pytest.fixture
def finished(folder: Path, run: Run) -> Path:
    tags = {"SMILES": {"length": 2}, "W": {"kind": "function", "length": 2, "head": HEAD}}
    trained = run("train", config(folder, "layers", tags=tags, data__template="{name} is <SMILES> {smiles} <W>"))
    assert trained.exit_code == 0, trained.output
    return folder / "runs" / "layers"


def test_a_run_reads_them_from_end_to_end(finished: Path, folder: Path, run: Run) -> None:
    head = TagLibrary.load(finished / "library").tags["W"].head
    assert head is not None and head.spec.layers == [0, 1] and head.spec.lengths
    assert head.weight_KF.shape[1] == 4 * tiny.HIDDEN
    for command in (("eval", finished), ("predict", finished, folder / "rows.csv", folder / "layers.csv")):
        done = run(*command)
        assert done.exit_code == 0, done.output
    results = json.loads((finished / "results.json").read_text())
    assert {"ridge_mean", "kernel_both"} <= set(results["baselines"])
    for method in ("prompt_tuning", "lora"):
        baseline = run("baseline", finished, "--method", method, "--lr", "1e-3", "--budget-s", "0.5")
        assert baseline.exit_code == 0, baseline.output


def test_what_cannot_be_read_is_refused(folder: Path, run: Run) -> None:
    def told(**heads: dict[str, Any]) -> Any:
        tags = {name: {"kind": "function", "length": 2, "head": head} for name, head in heads.items()}
        source = {"path": "rows.csv", "target": "weight"}
        template = "<SMILES> {smiles} "
        sources = [source | {"template": f"{template}<{name}>"} for name in heads]
        return run(
            "train", config(folder, "no-layers", tags={"SMILES": {"length": 2}, **tags}, data={"sources": sources})
        )

    fails(told(W={"reads": "both", "layers": [0, 9]}), "tags.W.head.layers is [0, 9]", "backbone has 2 layers")
    fails(told(W={"reads": "last", "layers": [0]}), "head", "reads is last", "set reads: both or mean")
    fails(told(W={"reads": "mean", "layers": [1, 1]}), "head", "layers is [1, 1]", "named once")
    two = told(V={"reads": "both", "layers": [1]}, W={"reads": "mean", "layers": []})
    fails(two, ".yaml: tags.W.head.layers is []", "that of <V> is [1]", "read the same layers")
    fails(told(W={"reads": "last", "lengths": True}), "head", "lengths is true", "set reads: both or mean")
    two = told(V={"reads": "both", "lengths": True}, W={"reads": "mean"})
    fails(two, "tags.W.head.lengths is False", "that of <V> is True", "read the same lengths")
