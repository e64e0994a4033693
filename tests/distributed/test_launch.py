"""The launch scripts as users call them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed.launch import Run, Workspace, assert_same

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
STAGES = ["stage1_domain", "stage2_function", "stage3_cross"]


def launch(script: str, arguments: list[str], **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / f"{script}.sh"), *arguments],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "launcher", "ranks"),
    [("stage1_domain", "torchrun", 2), ("stage2_function", "deepspeed", 2), ("stage3_cross", "none", 1)],
)
def test_every_launcher_trains_the_same(workspace: Workspace, script: str, launcher: str, ranks: int) -> None:
    _, config, *overrides = workspace.arguments(f"launched-{launcher}")
    cache = workspace.folder / "cache"
    ended = launch(script, [config, *overrides], LAUNCHER=launcher, RANKS=ranks, TAGLLM_CACHE=cache)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_same(Run(workspace.folder / f"launched-{launcher}").tags, workspace.train(1, "unlaunched").tags, 1e-5)


@pytest.mark.parametrize("script", STAGES)
def test_without_a_config_a_stage_trains_its_quickstart(script: str) -> None:
    ended = launch(script, ["optim.nonsense=1"], LAUNCHER="none")
    assert ended.returncode == 2
    assert f"configs/quickstart/{script[5]}_" in ended.stderr
    assert "optim.nonsense" in ended.stderr


def test_an_unknown_launcher_is_refused() -> None:
    ended = launch("stage1_domain", [], LAUNCHER="mpirun")
    assert ended.returncode == 2
    assert "mpirun" in ended.stderr and "torchrun, deepspeed or none" in ended.stderr


def test_run_needs_a_config() -> None:
    ended = launch("run", [])
    assert ended.returncode == 2
    assert "no config given" in ended.stderr
