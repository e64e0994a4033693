"""Who a rank is and which GPU it takes, by what its launcher says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tagllm import gpus
from tagllm.errors import UserError
from tagllm.origin import peak_memory_gib
from tagllm.ranks import Ranks


@pytest.mark.parametrize(("visible", "device"), [(4, 3), (1, 0)], ids=["all GPUs of the node", "its own alone"])
def test_a_rank_takes_a_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch, visible: int, device: int) -> None:
    """DeepSpeed takes the same; the number on the node stays what it is."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.start(60)
    assert [ranks.device] == taken == [torch.device("cuda", device)]
    assert (os.environ["LOCAL_RANK"], ranks.local) == (str(device), 3)


CUDA = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("said", "driver", "why"),
    [
        ({CUDA: "0,1"}, False, "CUDA_VISIBLE_DEVICES is 0,1"),
        ({"SLURM_GPUS_ON_NODE": "8"}, False, "SLURM_GPUS_ON_NODE is 8"),
        ({"SLURM_JOB_GPUS": "0"}, False, "SLURM_JOB_GPUS is 0"),
        ({}, True, "nvidiactl is there"),
        ({CUDA: "0", "CROSS_RANK": "0"}, True, "nvidiactl is there"),
        ({CUDA: "", "SLURM_JOB_GPUS": "0"}, True, ""),
        ({CUDA: "-1"}, True, ""),
        ({CUDA: "0,1", "DS_ACCELERATOR": "cpu"}, True, ""),
        ({CUDA: "0", "CROSS_RANK": "0"}, False, ""),
        ({"SLURM_GPUS_ON_NODE": "0"}, False, ""),
    ],
    ids=str,
)
def test_gpus_that_torch_does_not_see_are_not_left_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], driver: bool, why: str
) -> None:
    """Unless the CPU is meant. DeepSpeed's launcher, which sets CROSS_RANK, numbers the ranks of a CPU like GPUs."""
    for name in (CUDA, "CROSS_RANK", "DS_ACCELERATOR", *(n for n in os.environ if n.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "nvidiactl")
    if driver:
        gpus.DRIVER.touch()
    if not why:
        assert gpus.seen() == 0
        return
    with pytest.raises(UserError, match=rf"torch sees no GPU, but .*{why}: torch .* is built for .*DS_ACCELERATOR=cpu"):
        gpus.seen()


def test_memory_of_a_gpu_stands_beside_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [*peak_memory_gib()] == ["peak_gib"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 29)
    assert peak_memory_gib()["peak_gpu_gib"] == 1.5


def test_ranks_of_a_node_are_told_apart_by_their_number_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their device, which may be 0 for all of them."""

    def gather(_: Ranks, value: Any) -> list[Any]:
        return [(4, 0), (4, 1), (4, 2), value]

    monkeypatch.setattr(Ranks, "gather", gather)
    monkeypatch.setattr(dist, "new_group", lambda members: members)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Ranks(3, 4, torch.device("cpu"), local=3).of_my_node() == [0, 1, 2, 3]
