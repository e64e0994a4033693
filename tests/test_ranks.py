"""Who a rank is and which GPU it takes, by what its launcher says."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

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


def test_ranks_of_a_node_are_told_apart_by_their_number_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their device, which may be 0 for all of them."""

    def gather(_: Ranks, value: Any) -> list[Any]:
        return [(4, 0), (4, 1), (4, 2), value]

    monkeypatch.setattr(Ranks, "gather", gather)
    monkeypatch.setattr(dist, "new_group", lambda members: members)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Ranks(3, 4, torch.device("cpu"), local=3).of_my_node() == [0, 1, 2, 3]
