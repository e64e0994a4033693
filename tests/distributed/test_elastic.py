"""A node that dies: the other one goes on by itself, with the same rows in the same order."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.distributed.launch import Run, Workspace, assert_same, kill, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


def agent(workspace: Workspace, arguments: list[str], port: int, is_host: bool) -> subprocess.Popen[str]:
    """One node with one rank, as a user starts it on each machine; the host keeps the store of both."""
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "NNODES": "1:2",
        "TAGLLM_CACHE": str(workspace.folder / "cache"),
        "RDZV_ENDPOINT": f"127.0.0.1:{port}", "MAX_RESTARTS": "3", "RANKS": "1",
        "RDZV_CONF": f"is_host={int(is_host)},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "run.sh"), *arguments],
        env=environment, start_new_session=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_fewer_ranks_go_on_from_the_newest_checkpoint(workspace: Workspace) -> None:
    settings = {"optim__steps": 100, "checkpoint__every_steps": 10, "evaluation__every_steps": 1000}
    settings |= {
        "optim__tag_lr": 1e-4,
        "optim__head_lr": 1e-4,
    }  # large steps blow up the rounding of a sum over two ranks
    expected = workspace.train(1, "elastic-alone", **settings)
    _, config, *overrides = workspace.arguments("elastic", engine__timeout_s=10, **settings)
    run = Run(workspace.folder / "elastic")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (agent(workspace, [config, *overrides], port, is_host) for is_host in (True, False))
    try:
        wait_until(lambda: len(run.checkpoints) > 1, [first, second], 120)
        kill([second])
        assert first.wait(timeout=150) == 0
    finally:
        kill([first, second])
    assert [line["step"] for line in run.metrics] == list(range(1, 101))
    assert_same(run.tags, expected.tags, 1e-6)
