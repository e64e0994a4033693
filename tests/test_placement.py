"""Where `engine.zero_stage: auto` puts a backbone of seven billion weights, by the memory of a rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tagllm import plan
from tagllm.config import EngineConfig, RunConfig
from tagllm.config_file import parse_as
from tagllm.errors import UserError
from tagllm.ranks import Ranks
from tagllm.stage import Stage, read_stage
from tagllm.train.placement import host_memory, placed, placed_to_answer
from tests import tiny

SEVEN = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
PAGE = os.sysconf("SC_PAGE_SIZE")


def stage(folder: Path, remember_gib: float = 0, **engine: object) -> Stage:
    """Its config without its weights: nothing of them is loaded."""
    tiny.save_backbone(folder / "backbone")
    SEVEN.save_pretrained(folder / "backbone")
    (folder / "rows.csv").write_text("smiles\n" + "".join(f"C{'C' * n}O\n" for n in range(300)))
    values = {
        "output": str(folder / "run"), "backbone": {"model": str(folder / "backbone"), "dtype": "bf16"},
        "tags": {"S": {"length": 2}},
        "data": {"sources": [{"path": str(folder / "rows.csv"), "template": "It is <S> {smiles}"}]},
        "optim": {"steps": 2, "rows_per_step": 32, "rows_per_micro_batch": 2}, "engine": engine,
        "remember_gib": remember_gib,
    }  # fmt: skip
    return read_stage(parse_as(RunConfig, values, "test"), "test")


@pytest.mark.parametrize(
    ("gib_per_rank", "per_node", "expected"),
    [(40, 8, (0, "world")), (8, 8, (3, "node")), (4, 8, (3, "world")), (8, 16, (3, "world")), (8, 1, (3, "world"))],
)
def test_no_more_is_sent_than_memory_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib_per_rank: int, per_node: int, expected: tuple[int, str]
) -> None:
    """Two nodes of eight share within each if that is enough; one node of sixteen has no other to keep out of."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    monkeypatch.setenv("TAGLLM_CACHE", str(tmp_path / "cache"))
    pages = {"SC_PAGE_SIZE": PAGE, "SC_PHYS_PAGES": gib_per_rank * per_node * 2**30 // PAGE}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(plan, "cpu_multiplies_bf16", lambda: True)  # others hold the LM head in fp32 as well
    config, why = placed(stage(tmp_path), Ranks(0, 16, torch.device("cpu")))
    assert (config.engine.zero_stage, config.engine.shard_over) == expected, why
    assert why.startswith(("replicate", "shard")[config.engine.stage // 3])


@pytest.mark.parametrize(
    ("gib_per_rank", "num_ranks", "quantize", "given", "expected"),
    [
        (40, 16, "none", {}, (0, "world")), (20, 16, "none", {}, (3, "node")), (20, 16, "nf4", {}, (0, "world")),
        (20, 8, "none", {}, (3, "world")), (3, 16, "none", {}, (3, "world")), (20, 12, "none", {}, (3, "world")),
        (3, 16, "none", {"shard_over": "node"}, (3, "node")), (40, 16, "none", {"shard_over": "node"}, (0, "world")),
        (40, 16, "none", {"zero_stage": 3}, (3, "world")), (20, 16, "none", {"zero_stage": 0}, (0, "world")),
        (20, 1, "none", {"zero_stage": 3, "shard_over": "node"}, (0, "world")),
    ],
)  # fmt: skip
def test_a_backbone_that_only_answers_is_whole_where_half_of_a_rank_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib_per_rank: int, num_ranks: int, quantize: str,
    given: dict[str, Any], expected: tuple[int, str],
) -> None:  # fmt: skip
    """Its weights have 12.6 GiB in bf16, and a node eight ranks."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    pages = {"SC_PAGE_SIZE": PAGE, "SC_PHYS_PAGES": gib_per_rank * 8 * 2**30 // PAGE}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    backbone = stage(tmp_path).config.backbone.model_copy(update={"quantize": quantize})
    ranks = Ranks(1, num_ranks, torch.device("cpu"))
    monkeypatch.setattr(Ranks, "on_rank_zero", lambda self, function, long: function())
    engine = placed_to_answer(backbone, EngineConfig(**given), ranks)
    assert (engine.zero_stage, engine.shard_over) == expected


@pytest.mark.parametrize("shard_over", ["world", "node"])
def test_one_node_is_sharded_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_over: str
) -> None:
    """A rank has room for its part, not for the whole."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("TAGLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": PAGE, "SC_PHYS_PAGES": 64 * 2**30 // PAGE}.__getitem__)
    monkeypatch.setattr(plan, "cpu_multiplies_bf16", lambda: True)
    config, why = placed(stage(tmp_path, shard_over=shard_over), Ranks(0, 8, torch.device("cpu")))
    assert (config.engine.zero_stage, config.engine.shard_over) == (3, shard_over)
    assert "nothing fits" not in why


def test_budgets_for_a_whole_backbone_do_not_stand_in_the_way_of_sharding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only who asks for stage 3 and for memory at once is refused."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("TAGLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": PAGE, "SC_PHYS_PAGES": 64 * 2**30 // PAGE}.__getitem__)
    monkeypatch.setattr(plan, "cpu_multiplies_bf16", lambda: True)
    config, why = placed(stage(tmp_path, remember_gib=4), Ranks(0, 8, torch.device("cpu")))
    assert config.engine.zero_stage == 3 and "remember_gib and remember_device_gib are 0 then" in why
    assert read_stage(config, "test").config.remember_gib == 0
    with pytest.raises(UserError, match=r"remember_gib is 4\.0 and remember_device_gib 0, but engine.zero_stage is 3"):
        stage(tmp_path, remember_gib=4, zero_stage=3)


def test_a_user_who_shards_in_nodes_gets_nothing_wider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("TAGLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": PAGE, "SC_PHYS_PAGES": 24 * 2**30 // PAGE}.__getitem__)
    config, why = placed(stage(tmp_path, shard_over="node"), Ranks(0, 16, torch.device("cpu")))
    assert (config.engine.zero_stage, config.engine.shard_over) == (3, "node")
    assert "nothing fits" in why


def test_shards_of_nodes_need_stage_3(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shard_over is node, but zero_stage 0 shards no backbone; it must be 3"):
        stage(tmp_path, shard_over="node", zero_stage=0)


def test_memory_is_that_of_the_job(tmp_path: Path) -> None:
    """The least of its control group and of those that this is part of, in either version of them."""
    for text, files, gib in (
        ("0::/slurm/job_1/task_0\n", {"slurm/job_1/memory.max": 16, "slurm/job_1/task_0/memory.max": None}, 16),
        ("4:memory:/job\n1:cpu:/\n", {"memory/job/memory.limit_in_bytes": 8}, 8),
        ("0::/\n", {"memory.max": None}, None),
    ):
        root = tmp_path / str(gib)
        for name, limit in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("max\n" if limit is None else f"{limit << 20}\n")
        (root / "mine").write_text(text)
        expected = gib << 20 if gib else PAGE * os.sysconf("SC_PHYS_PAGES")
        assert host_memory(root, root / "mine") == expected
