"""A run that was stopped and started again ends as if it had never stopped."""

from __future__ import annotations

import signal

import pytest

from tagllm.train.signals import EXIT_STOPPED
from tests.distributed.launch import Run, Workspace, assert_same, finish, signal_after, start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
CLOSE = 1e-5
STEPS = 40
"""Enough that a signal sent at step 3 lands well before the end."""
LONG = {"optim__steps": STEPS, "optim__tag_lr": 1e-3, "evaluation__every_steps": 15}
SHARDED = {"engine__zero_stage": 3}


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace) -> Run:
    return workspace.train(2, "undisturbed", **LONG)


@pytest.fixture(scope="module")
def stopped(workspace: Workspace) -> Run:
    run = workspace.stop(2, "stopped", **LONG)
    assert_stopped_midway(run)
    return run


def assert_stopped_midway(run: Run) -> None:
    assert len(run.checkpoints) == 1 and not (run.path / "library").exists()
    assert 3 <= int(run.checkpoints[0].name.removeprefix("step-")) < STEPS


def assert_same_end(found: Run, expected: Run, relative: float) -> None:
    assert_same(found.state, expected.state, relative)
    assert_same(found.tags, expected.tags, relative)
    assert [line["step"] for line in found.metrics] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_command_itself_stops_and_goes_on(workspace: Workspace, undisturbed: Run, asked: signal.Signals) -> None:
    """Two processes as torchrun starts them; a signal to one; then the same command again."""
    name = f"command-{asked}"
    arguments, run = ["tagllm", *workspace.arguments(name, **LONG)], Run(workspace.folder / name)
    ranks = start(arguments, 2, workspace.folder / "cache")
    try:
        signal_after(run, 3, ranks, asked)
    finally:
        outcome = finish(ranks)
    assert outcome.status == [EXIT_STOPPED, EXIT_STOPPED], outcome.stderr
    assert_stopped_midway(run)
    outcome = finish(start(arguments, 2, workspace.folder / "cache"))
    assert outcome.status == [0, 0], outcome.stderr
    assert_same_end(run, undisturbed, 0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_goes_on_bit_for_bit(workspace: Workspace, undisturbed: Run, stopped: Run, stage: int) -> None:
    settings = {**LONG, "engine__zero_stage": stage}
    expected = workspace.train(2, f"undisturbed-{stage}", **settings) if stage else undisturbed
    before = workspace.stop(2, f"stopped-{stage}", **settings) if stage else stopped
    workspace.copy(before, f"again-{stage}")
    assert_same_end(workspace.train(2, f"again-{stage}", **settings), expected, 0)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3), (1, 3)])
def test_goes_on_with_another_number_of_ranks_and_stage(
    workspace: Workspace, undisturbed: Run, stopped: Run, ranks: int, stage: int
) -> None:
    name = f"changed-{ranks}-{stage}"
    workspace.copy(stopped, name)
    assert_same_end(workspace.train(ranks, name, **LONG, engine__zero_stage=stage), undisturbed, CLOSE)


def test_goes_on_with_more_ranks_and_replicated(workspace: Workspace, undisturbed: Run) -> None:
    before = workspace.stop(1, "stopped-alone", **LONG, **SHARDED)
    assert_stopped_midway(before)
    workspace.copy(before, "grown")
    assert_same_end(workspace.train(2, "grown", **LONG), undisturbed, CLOSE)


def test_goes_on_with_remembered_prefixes(workspace: Workspace, undisturbed: Run) -> None:
    """What is remembered was computed in other batches after a stop, so this is close, not bitwise."""
    before = workspace.stop(2, "stopped-remembering", **LONG, remember_gib=1)
    workspace.copy(before, "remembering")
    assert_same_end(workspace.train(2, "remembering", **LONG, remember_gib=1), undisturbed, CLOSE)
