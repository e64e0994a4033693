"""A sharded backbone, as it is or quantised: every rank holds its part, and trains what one process trains."""

from __future__ import annotations

import pytest

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
