"""A sharded backbone, as it is or quantised: every rank holds its part, and trains what one process trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.distributed.launch import Workspace, assert_same

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_sharded_quantised_backbone_equals_one_process(workspace: Workspace, quantize: str) -> None:
    reads = {"tags__Size__head__layers": [0, 1] if quantize == "nf4" else []}
    expected = workspace.train(1, f"{quantize}-alone", backbone__quantize=quantize, **reads)
    plain = workspace.train(1, f"{quantize}-plain", **reads)
    run = workspace.train(
        2, f"{quantize}-sharded", backbone__quantize=quantize, engine__zero_stage=3,
        engine__deepspeed=workspace.sharding, **reads,
    )  # fmt: skip
    assert_same(run.tags, expected.tags, 1e-5)
    assert_same(run.state, expected.state, 1e-5)
    assert not run.tags["SMILES.rows"].equal(plain.tags["SMILES.rows"]), "quantised in name only"


@pytest.mark.parametrize(
    ("asks", "sharded"), [("a head", True), ("for text", True), ("for text", False)],
    ids=["a head of a sharded backbone", "for text of a sharded backbone", "for text of a whole backbone"],
)  # fmt: skip
def test_ranks_answer_as_one_process(workspace: Workspace, asks: str, sharded: bool) -> None:
    """With baselines, controls and ablations: each rank has its part of the backbone, as if none could hold it, or all
    of it, and answers its share."""
    text: dict[str, object] = {
        "data__sources[0]__template": '"The molecule is <SMILES> {smiles}. <Size> {output}"',
        "data__sources[0]__output": "name", "data__sources[0]__target": "[]", "tags__Size__head": "null",
        "loss__value": 0.0, "evaluation__max_new_tokens": 20,
        "backbone__model": backbone_that_ends_with(workspace, "A"),
    }  # fmt: skip
    engine = {"engine__zero_stage": 3, "engine__deepspeed": workspace.sharding} if sharded else {}
    run = workspace.train(2, f"scored-{asks}-{sharded}", **engine, **(text if asks == "for text" else {}))
    options = [f"{key.replace('__', '.')}={value}" for key, value in engine.items()]
    whole = workspace.predict(1, run)
    for batch in 1, 16, 48:  # of three batches both answer the last
        for row, alone in zip(workspace.predict(2, run, f"--batch={batch}", *options), whole, strict=True):
            answer, wanted = row.pop("Size"), alone["Size"]
            assert row == {name: value for name, value in alone.items() if name != "Size"} and not row["tagllm_error"]
            assert answer == wanted or float(answer) == pytest.approx(float(wanted), rel=1e-3, abs=1e-5)
    if asks == "for text":
        lengths = [len(row["Size"]) for row in sorted(whole, key=lambda row: len(row["smiles"]))]
        together = zip(lengths[::2], lengths[1::2], strict=True)  # one row each
        assert any(0 in pair and max(pair) > 16 for pair in together), "one goes on when all of another have ended"
    found = workspace.score(2, run, "--ablate")
    expected = workspace.score(1, run, "--ablate")
    assert (found["ranks"], found["sharded"], expected["sharded"]) == (2, sharded, False)
    assert found["metrics"].keys() == expected["metrics"].keys()
    for part in ("metrics", "baselines", "controls", "ablations"):
        assert flat(found[part]) == pytest.approx(flat(expected[part]), rel=1e-3, abs=1e-5), part


def backbone_that_ends_with(workspace: Workspace, token: str) -> Path:
    """The same, but of its random texts some end early."""
    folder = workspace.folder / f"ends-with-{token}"
    shutil.copytree(workspace.folder / "backbone", folder, dirs_exist_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}))
    return folder


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
def test_prompts_are_scored_by_ranks_as_by_one_process(workspace: Workspace, sharded: bool) -> None:
    """Heads and text, worked examples too; started again, what is there is read."""
    libraries = [workspace.train(1, f"asked-{sharded}").path / "library"]
    rows = {"path": str(workspace.folder / "rows.csv")}
    cases = {
        "values": {
            "source": {**rows, "target": "size"},
            "prompts": {"tags": "The molecule is <SMILES> {smiles}. Its size is <Size>", "bare": "{smiles} <Size>"},
        },
        "names": {
            "source": {**rows, "output": "name"},
            "prompts": {
                "tags": "<SMILES> {smiles} {output}", "shots": {"template": "{smiles}: {output}\n", "shots": 2},
                "copied": {"copies": "smiles"},
            },
        },
    }  # fmt: skip
    engine = {"zero_stage": 3, "deepspeed": str(workspace.sharding)} if sharded else {}
    expected = workspace.compose(1, f"composed-alone-{sharded}", libraries, cases, engine=engine)
    found = workspace.compose(2, f"composed-{sharded}", libraries, cases, engine=engine)
    assert [(case["ranks"], case["sharded"]) for case in found + expected] == [(2, sharded)] * 2 + [(1, False)] * 2
    for mine, alone in zip(found, expected, strict=True):
        for part in ("metrics", "intervals", "controls", "control_intervals"):
            assert flat(mine[part]) == pytest.approx(flat(alone[part]), rel=1e-3, abs=1e-5), part
    assert workspace.compose(2, f"composed-{sharded}", libraries, cases, engine=engine) == found


def test_no_text_passes_the_last_position_that_is_learned(workspace: Workspace) -> None:
    """Of GPT-2, which has 256 here: where one rank's texts have ended, it keeps step with those of another."""
    gpt2 = tiny.save_backbone(workspace.folder / "gpt2", "gpt2")
    library = workspace.train(1, "gpt2-trained", backbone__model=gpt2).path / "library"
    case = {
        "source": {"path": str(workspace.folder / "rows.csv"), "output": "name"},
        "prompts": {"bare": f"{'x' * 205} {{smiles}} {{output}}"},
    }
    settings = {
        "backbone": {"model": str(gpt2), "dtype": "fp32"},
        "evaluation": {"rows_per_batch": 1, "max_new_tokens": 60},
    }
    engine = {"zero_stage": 3, "deepspeed": str(workspace.sharding)}
    (found,) = workspace.compose(2, "gpt2-composed", [library], {"case": case}, engine=engine, **settings)
    assert found["sharded"] and found["rows"] > 2, "some texts are written beside others"


def test_a_head_alone_is_trained_over_ranks_too(workspace: Workspace) -> None:
    """No row of a tag is learned."""
    absent = {"tags__SMILES__absent": True, "tags__Size__absent": True, "loss__span": 0.0}
    expected = workspace.train(1, "no-rows-alone", **absent)
    run = workspace.train(2, "no-rows", engine__zero_stage=3, engine__deepspeed=workspace.sharding, **absent)
    assert_same(run.tags, expected.tags, 1e-5)


def flat(values: Any, name: str = "") -> dict[str, float]:
    if isinstance(values, dict):
        return {at: number for key, inner in values.items() for at, number in flat(inner, f"{name}/{key}").items()}
    return {name: values} if isinstance(values, int | float) else {}


def test_a_sharded_backbone_that_rounds_its_inputs_equals_a_whole_one(workspace: Workspace) -> None:
    """LLM.int8 makes a whole step of an input's last bit, and a sum's last bit is of how many rows a pass multiplies.
    So both pass the same rows (nothing is shared of a prefix), and no step begins where another's bits led."""
    alike = {"prefix": "full", "optim__steps": 1, "optim__warmup_steps": 0}
    whole = workspace.train(2, "llm_int8-whole", backbone__quantize="llm_int8", **alike)
    weights_only = workspace.train(2, "llm_int8-weights-only", backbone__quantize="int8", **alike)
    run = workspace.train(
        2, "llm_int8-sharded", backbone__quantize="llm_int8", engine__zero_stage=3,
        engine__deepspeed=workspace.sharding, **alike,
    )  # fmt: skip
    assert run.metrics[0]["train/loss"] == pytest.approx(whole.metrics[0]["train/loss"], rel=1e-6)
    assert_same(run.tags, whole.tags, 1e-5)
    assert_same(run.state, whole.state, 1e-5)
    assert run.metrics[0]["train/loss"] != weights_only.metrics[0]["train/loss"], "rounds its inputs in name only"
