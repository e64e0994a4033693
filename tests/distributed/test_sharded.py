"""A sharded backbone, as it is or quantised: every rank holds its part, and trains what one process trains."""

from __future__ import annotations

import pytest

from tests.distributed.launch import Workspace, assert_same

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]


@pytest.mark.parametrize("quantize", ["int8", "llm_int8", "nf4"])
def test_a_sharded_quantised_backbone_equals_one_process(workspace: Workspace, quantize: str) -> None:
    expected = workspace.train(1, f"{quantize}-alone", backbone__quantize=quantize)
    plain = workspace.train(1, f"{quantize}-plain")
    run = workspace.train(
        2, f"{quantize}-sharded", backbone__quantize=quantize, engine__zero_stage=3,
        engine__deepspeed=workspace.sharding,
    )  # fmt: skip
    assert_same(run.tags, expected.tags, 1e-5)
    assert_same(run.state, expected.state, 1e-5)
    assert not run.tags["SMILES.rows"].equal(plain.tags["SMILES.rows"]), "quantised in name only"
