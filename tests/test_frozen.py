"""Frozen is frozen: backbone and loaded tags are bit-identical after training, and nothing else is optimised."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tagllm.build import Built, build
from tagllm.config import RunConfig
from tagllm.config_file import parse_as
from tagllm.evaluate.closed_form import fit_head
from tagllm.head import Head
from tagllm.model.prefix import PrefixMemory
from tagllm.model.value_head import HeadModule
from tagllm.ranks import Ranks
from tagllm.run_folder import RunFolder
from tagllm.stage import read_stage
from tagllm.tags import TagLibrary
from tagllm.train.engine import Engine
from tagllm.train.loop import Trainer
from tagllm.train.signals import StopRequest
from tests import tiny


class Trained(NamedTuple):
    built: Built
    engine: Engine
    before: str
    run: RunFolder
    domain: TagLibrary
    remembered: list[int]
    """Bytes of prefixes beside each fit in closed form."""


def train(config: RunConfig, ranks: Ranks) -> tuple[Built, Engine, str]:
    built = build(read_stage(config, "test"), ranks)
    before = tiny.weights_digest(built.model.backbone)
    engine = Engine(built.model, config.optim, config.engine, ranks)
    Trainer(built, engine, ranks, RunFolder(Path(config.output)), StopRequest()).run_to_the_end()
    return built, engine, before


def memories() -> list[PrefixMemory]:
    """All of this process."""
    return [one for one in gc.get_objects() if isinstance(one, PrefixMemory)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Stage 1 learns a domain tag; stage 2 loads it and learns a function tag with a head."""
    folder = tmp_path_factory.mktemp("frozen")
    tiny.save_backbone(folder / "backbone")
    (folder / "rows.csv").write_text(
        "smiles,size\n" + "".join(f"{'C' * (n % 9 + 1)}{'N' * n},{n}\n" for n in range(40))
    )
    source = {"path": str(folder / "rows.csv"), "template": "The molecule is <SMILES> {smiles}"}
    common = {
        "backbone": {"model": str(folder / "backbone"), "dtype": "fp32"},
        "optim": {"steps": 4, "rows_per_step": 8, "rows_per_micro_batch": 4, "weight_decay": 0.1},
    }
    first = {"output": str(folder / "1"), "tags": {"SMILES": {"length": 3}}, "data": {"sources": [source]}, **common}
    tags = {
        "SMILES": {"load": str(folder / "1" / "library")},
        "Size": {"kind": "function", "length": 2, "head": {"reads": "both"}},
    }
    labelled = {**source, "template": f"{source['template']}. Its size is <Size>", "target": "size"}
    second = {"output": str(folder / "2"), "tags": tags, "data": {"sources": [labelled]}, **common}
    remembered, of_other_tests = list[int](), memories()

    def fit(*arguments: Any) -> Head:
        remembered.append(sum(one.used_host for one in memories() if not any(one is other for other in of_other_tests)))
        return fit_head(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tagllm.train.validation.fit_head", fit)
        patch.setenv("TAGLLM_CACHE", str(folder / "cache"))
        patch.setenv("LOCAL_RANK", "0")
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        ranks = Ranks.start(60)
        for output in ("1", "2"):
            (folder / output).mkdir()
        train(parse_as(RunConfig, first, "first"), ranks)
        domain = TagLibrary.load(folder / "1" / "library")
        built, engine, before = train(parse_as(RunConfig, second, "second"), ranks)
        yield Trained(built, engine, before, RunFolder(folder / "2"), domain, remembered)


def test_backbone_is_bit_identical(trained: Trained) -> None:
    assert tiny.weights_digest(trained.built.model.backbone) == trained.before


def test_loaded_tags_are_bit_identical(trained: Trained) -> None:
    expected = trained.domain.tags["SMILES"].rows_PD
    for folder in (trained.run.library, trained.run.last):
        assert TagLibrary.load(folder).tags["SMILES"].rows_PD.equal(expected)
    assert trained.built.model.tags.frozen_TD.equal(expected)


def test_optimizer_holds_only_learned_rows_and_heads(trained: Trained) -> None:
    held = [p for group in trained.engine._inner.param_groups for p in group["params"]]
    model = trained.built.model
    expected = [model.tags.learned_TD, *model.heads["Size"].parameters()]
    assert [id(p) for p in held] == [id(p) for p in expected]
    assert set(trained.engine._inner.state) == set(expected)


def test_saved_is_learned(trained: Trained) -> None:
    learned = trained.engine.learned()
    size = TagLibrary.load(trained.run.last).tags["Size"]
    assert size.head
    assert set(learned) == {"tags.learned_TD", "heads.Size.weight_KF", "heads.Size.bias_K"}
    assert size.rows_PD.equal(learned["tags.learned_TD"])
    head = trained.built.model.heads["Size"]
    assert isinstance(head, HeadModule)
    weight_KF, bias_K = head.folded(learned["heads.Size.weight_KF"], learned["heads.Size.bias_K"])
    assert size.head.weight_KF.equal(weight_KF) and size.head.bias_K.equal(bias_K)
    assert size.rows_PD.dtype == torch.float32


def test_the_last_fit_has_no_prefixes_beside_it(trained: Trained) -> None:
    *during, last = trained.remembered
    assert min(during) > 0
    assert last == 0
