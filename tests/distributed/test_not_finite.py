"""Numbers that are not finite: all ranks refuse the step alike; a run that makes nothing else ends with a reason."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.distributed.faults import Poison
from tests.distributed.launch import Run, Workspace, assert_same

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]
SETTINGS = {"checkpoint__every_steps": 1, "checkpoint__keep": 10, "evaluation__every_steps": 100}


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_poisoned_step_changes_nothing(workspace: Workspace, stage: int, rank: int) -> None:
    """The third step, by one rank's gradient alone; the steps behind it go on from where the second one ended."""
    name = f"poisoned-{stage}-{rank}"
    outcome = workspace.attempt(2, name, Poison(rank, [2]), engine__zero_stage=stage, **SETTINGS)
    assert outcome.status == [0, 0], "\n".join(outcome.stderr)
    run = Run(workspace.folder / name)
    before, after, later = (load_file(run.checkpoints[i] / "state.safetensors") for i in (1, 2, 3))
    assert_same(after, before, 0)
    assert not later["tags.learned_TD"].equal(before["tags.learned_TD"])
    assert all(tensor.isfinite().all() for tensor in run.state.values())
    assert [line["train/skipped_steps"] for line in run.metrics] == [0, 0, 1, 1, 1, 1]


def test_the_optimizer_does_not_count_a_skipped_step(workspace: Workspace) -> None:
    """Stopped behind it and resumed, the tags are those of a run that was not stopped."""
    assert workspace.attempt(2, "skips", Poison(1, [1]), **SETTINGS).status == [0, 0]
    whole = Run(workspace.folder / "skips")
    resumed = workspace.copy(whole, "skips-resumed")
    for folder in (resumed.path / "library", resumed.path / "last", *resumed.checkpoints[3:]):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert workspace.attempt(2, "skips-resumed", **SETTINGS).status == [0, 0]
    assert_same(resumed.state, whole.state, 0)


def test_too_many_in_a_row_end_the_run_with_its_rows(workspace: Workspace) -> None:
    outcome = workspace.attempt(
        2, "hopeless", Poison(0, list(range(2, 100))), optim__steps=20, optim__skipped_in_a_row=3, **SETTINGS
    )
    assert outcome.status == [2, 2]
    (line,) = outcome.stderr[0].strip().splitlines()[-1:]
    assert "step 5: the loss is" in line and "nan" in line
    assert "optim.tag_lr" in line and "The molecule is" in line
    assert [path.name for path in Run(workspace.folder / "hopeless").checkpoints][-1].endswith("4")
