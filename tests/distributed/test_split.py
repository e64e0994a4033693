"""How the rows of a step are split over ranks, micro-batches and shards changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.launch import Run, Workspace, assert_same

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
CLOSE = 1e-5


def assert_same_run(found: Run, expected: Run, relative: float = CLOSE) -> None:
    """Learned parameters, both moments, the best state, the library and every logged loss and norm."""
    assert_same(found.state, expected.state, relative)
    assert_same(found.tags, expected.tags, relative)
    scalars = ("train/loss", "train/span_nats", "train/output_nats", "train/value_loss", "train/gradient_norm")
    assert len(found.metrics) == len(expected.metrics) > 0
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        assert {k: ours[k] for k in scalars if k in ours} == pytest.approx(
            {k: theirs[k] for k in scalars if k in theirs}, rel=relative
        )


@pytest.fixture(scope="module")
def alone(workspace: Workspace) -> Run:
    return workspace.train(1, "alone")


@pytest.fixture(scope="module")
def one_step(workspace: Workspace) -> Run:
    """All eight rows at once. Without clipping the first moment is a tenth of the gradient."""
    return workspace.train(1, "one-step", optim__steps=1, optim__clip="null", optim__rows_per_micro_batch=8)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (1, 1), (1, 3), (2, 16), (2, 4), (2, 3), (2, 2), (2, 1)])
def test_gradient_does_not_depend_on_the_split(
    workspace: Workspace, one_step: Run, ranks: int, micro_batch: int
) -> None:
    run = workspace.train(
        ranks, f"split-{ranks}-{micro_batch}",
        optim__steps=1, optim__clip="null", optim__rows_per_micro_batch=micro_batch,
    )  # fmt: skip
    assert float(run.state["tags.learned_TD.exp_avg"].norm()) > 1e-3
    assert_same_run(run, one_step)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_process(workspace: Workspace, alone: Run, stage: int) -> None:
    assert_same_run(workspace.train(2, f"stage-{stage}", engine__zero_stage=stage), alone)


@pytest.mark.parametrize("prefix", ["frozen", "full"])
def test_a_sharded_backbone_equals_one_process(workspace: Workspace, alone: Run, prefix: str) -> None:
    settings = {"engine__zero_stage": 3, "engine__deepspeed": workspace.sharding}
    assert_same_run(workspace.train(2, f"sharded-{prefix}", prefix=prefix, **settings), alone)


def test_a_sharded_bf16_backbone_is_close_and_learned_rows_stay_fp32(workspace: Workspace) -> None:
    expected = workspace.train(1, "bf16-alone", backbone__dtype="bf16")
    run = workspace.train(
        2, "bf16-sharded", backbone__dtype="bf16", engine__zero_stage=3, engine__deepspeed=workspace.sharding
    )
    assert {tensor.dtype for tensor in run.state.values()} == {torch.float32}
    assert not run.state["tags.learned_TD"].equal(run.state["tags.learned_TD"].bfloat16().float())
    assert_same(run.tags, expected.tags, 0.02)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_without_targets_or_labels_keeps_up(workspace: Workspace, stage: int) -> None:
    """One row per rank and step: a number for the head or a word to write, so ranks differ and terms come and go."""
    path = str(workspace.folder / "rows.csv")
    sources = [
        {"path": path, "template": "The molecule is <SMILES> {smiles}. Its size is <Size>", "target": "size"},
        {"path": path, "template": "{smiles} is called <Name> {output}", "output": "name"},
    ]
    overrides = {
        "data__sources": json.dumps(sources), "tags__Name": "{kind: function, length: 2}",
        "optim__rows_per_step": 2, "optim__rows_per_micro_batch": 1, "optim__steps": 8,
    }  # fmt: skip
    expected = workspace.train(1, f"mixed-alone-{stage}", **overrides)
    kinds = [{"train/value_loss", "train/output_nats"} & set(line) for line in expected.metrics]
    assert {len(kind) for kind in kinds} == {1, 2}, "both a step of one kind and one whose ranks differ"
    sharding = {"engine__deepspeed": workspace.sharding} if stage == 3 else {}
    run = workspace.train(2, f"mixed-{stage}", engine__zero_stage=stage, **overrides, **sharding)
    assert_same_run(run, expected)
