"""What a checkpoint of SmolLM2 tags weighs and takes: gather, write, fsync, read back, prune."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from tagllm.build import build
from tagllm.ranks import Ranks
from tagllm.stage import read_stage
from tagllm.train import checkpoint
from tagllm.train.engine import Engine
from tests.real.test_plan import run_config

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


def test_a_checkpoint_is_small_and_quick(tmp_path: Path, ranks: Ranks) -> None:
    config = run_config(tmp_path / "run", 8)
    tags = config.tags["QED"].model_copy(update={"length": 40})
    config = config.model_copy(update={"tags": {"QED": tags}})
    built = build(read_stage(config, "test"), ranks)
    engine = Engine(built.model, config.optim, config.engine, ranks)
    best = {f"best.{name}": value for name, value in engine.learned().items()}
    seconds = []
    for step in range(1, 10):
        began = time.perf_counter()
        state = checkpoint.TrainState(step, engine.state() | best, {"best_loss": 1.0}, built.identity())
        path = checkpoint.save(tmp_path / "checkpoints", state, keep=2)
        seconds.append(time.perf_counter() - began)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"40 rows of 576 and a head: {size / 1000:.0f} kB, {statistics.median(seconds) * 1000:.0f} ms")
    assert size < 1_000_000
    assert statistics.median(seconds) < 0.1
