"""Absent tags: no place in the prompt, and a head that reads right before where the tag would have stood."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tagllm.config_file import load_config
from tagllm.errors import UserError
from tagllm.stage import read_stage
from tagllm.tags import TagLibrary
from tests import tiny
from tests.commands import Run, config, fails

D = "The molecule is <D> {smiles} and weighs <W>"
TAGS = {"D": {"length": 2}, "W": {"kind": "function", "length": 2, "head": {"refit": False}}}


def test_a_run_without_its_function_tag_learns_the_head_alone(run: Run, folder: Path) -> None:
    file = config(folder, "absent", tags={"W": TAGS["W"] | {"absent": True}})
    result = run("train", file, "optim.steps=6", "checkpoint.every_steps=2")
    assert result.exit_code == 0, result.stderr
    library = TagLibrary.load(folder / "runs/absent/library")
    tag = library.tags["W"]
    assert tag.rows_PD.shape == (0, tiny.HIDDEN)
    assert tag.head is not None and tag.head.weight_KF.abs().sum() > 0
    logged = [json.loads(line) for line in (folder / "runs/absent/metrics.jsonl").read_text().splitlines()]
    assert "heads/W/gradient_norm" in logged[0] and "tags/W/gradient_norm" not in logged[0]


def test_its_head_reads_the_last_token_before_it(run: Run, folder: Path) -> None:
    """What predict answers is the head over transformers' own last hidden state of the prompt without the tag."""
    file = config(folder, "absent_reads", tags={"W": TAGS["W"] | {"absent": True}})
    assert run("train", file, "optim.head_lr=0.1").exit_code == 0
    head = TagLibrary.load(folder / "runs/absent_reads/library").tags["W"].head
    assert head is not None
    assert run("predict", folder / "runs/absent_reads", folder / "rows.csv", folder / "out.csv").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "backbone").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    with (folder / "out.csv").open() as stream:
        for row in list(csv.DictReader(stream))[:5]:
            ids = tokenizer(f"The molecule {row['smiles']} weighs", return_tensors="pt").input_ids
            with torch.no_grad():
                last_D = model.base_model(ids).last_hidden_state[0, -1]
            expected = float((head.weight_KF[0] @ last_D + head.bias_K[0]) * head.std_K[0] + head.mean_K[0])
            assert float(row["W"]) == pytest.approx(expected, abs=1e-3)


def test_an_absent_domain_tag_takes_no_place(run: Run, folder: Path) -> None:
    """A loaded one and a new one alike: the prompts are those of the template without it."""
    losses = {}
    for name, tags, template in (
        ("loaded", {"D": {"load": "runs/first/library", "absent": True}, "W": TAGS["W"]}, D),
        ("new", {"D": {"length": 2, "absent": True}, "W": TAGS["W"]}, D),
        ("none", {"W": TAGS["W"]}, D.replace(" <D>", "")),
    ):
        if name == "loaded":
            assert run("train", config(folder, "first", tags=TAGS, data__template=D)).exit_code == 0
        result = run("train", config(folder, name, tags=tags, data__template=template))
        assert result.exit_code == 0, result.stderr
        first = (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()[0]
        losses[name] = json.loads(first)["train/loss"]
    assert losses["loaded"] == losses["new"] == pytest.approx(losses["none"], rel=1e-6)


def test_probes_read_the_same_with_the_tag_and_without_it(run: Run, folder: Path) -> None:
    found = {}
    for absent in (True, False):
        file = config(folder, f"probed-{absent}", tags={"W": TAGS["W"] | {"absent": absent}})
        assert run("train", file).exit_code == 0
        assert run("eval", folder / f"runs/probed-{absent}").exit_code == 0
        found[absent] = json.loads((folder / f"runs/probed-{absent}/results.json").read_text())["baselines"]
    for probe in ("ridge_last", "ridge_mean", "ridge_both"):
        assert found[True][probe]["mse"] == pytest.approx(found[False][probe]["mse"], rel=1e-3)


def test_what_nothing_can_be_learned_of_is_told(run: Run, folder: Path) -> None:
    text = config(
        folder, "text", tags={"T": {"kind": "function", "absent": True}}, data__template="{smiles} <T> {output}"
    )
    fails(run("check", text, "data.sources[0].output=name", "data.sources[0].target=[]"), "tags: none is learned")
    loaded = {"D": {"load": "runs/first/library", "absent": True, "learn": True}, "W": TAGS["W"]}
    fails(run("check", config(folder, "learn", tags=loaded, data__template=D)), "an absent tag has no rows to learn")


def test_a_key_of_all_new_tags_in_one_override(folder: Path) -> None:
    tags = {"D": TAGS["D"], "W": TAGS["W"], "E": {"load": "somewhere"}}
    file = config(folder, "short", tags=tags)
    changed = load_config(file, ["tags.length=7", "tags.D.init=normal"])
    assert [changed.tags[name].length for name in ("D", "W")] == [7, 7]
    assert changed.tags["E"].load == "somewhere"
    with pytest.raises(UserError, match="tags.lenght"):
        load_config(file, ["tags.lenght=7"])
    named = config(folder, "named", tags={"length": {"length": 3}, "W": TAGS["W"]})
    assert load_config(named, ["tags.length.length=4"]).tags["length"].length == 4, "a tag of that name comes first"


def test_stage_knows_the_lengths(folder: Path) -> None:
    file = config(folder, "lengths", tags=TAGS, data__template=D)
    layout = read_stage(load_config(file, ["tags.absent=true"]), "x").layout(10)
    assert layout.lengths == {"D": 0, "W": 0} and layout.learned == ("W",)
