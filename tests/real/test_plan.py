"""What `tagllm plan` says of SmolLM2 against what is measured: within 15 %."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import held_bytes, peak_tensor_bytes
from tagllm.build import build
from tagllm.config import BackboneConfig, RunConfig
from tagllm.config_file import parse_as
from tagllm.data.batch import count
from tagllm.model.backbone import load_backbone, resolve
from tagllm.model.linear import FrozenLinear
from tagllm.model.loading import skeleton
from tagllm.model.loss import total
from tagllm.plan import Hardware, Load, Shape, estimate
from tagllm.ranks import Ranks
from tagllm.stage import read_stage

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
CLOSE = 0.15
ALONE = Hardware(1, 1, 80, 300, 25, 300)
PROMPT = "The SMILES of the molecule is {smiles}. Its drug-likeness is <QED>"


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_weights(quantize: Any) -> None:
    shape = Shape.of(skeleton(resolve("smollm2"), torch.bfloat16), quantize)
    model = load_backbone(BackboneConfig(model="smollm2", dtype="bf16", quantize=quantize), torch.device("cpu")).model
    assert shape.weight_bytes + shape.scale_bytes == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=1e-3)


@pytest.mark.parametrize("rows", [8, 32])
def test_what_a_step_keeps_for_backward(rows: int, tmp_path: Path, ranks: Ranks) -> None:
    config = run_config(tmp_path, rows)
    built = build(read_stage(config, "test"), ranks)
    examples = built.examples("train")[0]
    batch = built.collator()([examples[i] for i in range(rows)])
    expected = estimate(
        Shape.of(built.backbone.model, "none"), [Load.of(batch)], 0, config, ALONE, "replicate", cuda=False
    )
    with held_bytes(built.model) as held:
        loss = total(built.model(batch).sums, count(batch), built.stage.weights)
        found = held(loss)
    planned = expected.memory["kept for backward"] + expected.memory["prefix keys and values"]
    print(f"{rows} rows: planned {planned / 2**20:.1f} MiB, kept {found / 2**20:.1f}")
    assert found == pytest.approx(planned, rel=CLOSE)


@pytest.mark.parametrize("rows", [8, 32])
def test_floating_point_operations(rows: int, tmp_path: Path, ranks: Ranks) -> None:
    """As torch counts them; it does not know products of packed weights, so there are none here."""
    config = run_config(tmp_path, rows)
    built = build(read_stage(config, "test"), ranks)
    for module in built.model.modules():
        if isinstance(module, FrozenLinear):
            module.packs = False
    batch = built.collator()([built.examples("train")[0][i] for i in range(rows)])
    planned = estimate(
        Shape.of(built.backbone.model, "none"), [Load.of(batch)], 0, config, ALONE, "replicate", cuda=False
    ).flops
    with Flops() as counted:
        total(built.model(batch).sums, count(batch), built.stage.weights).backward()
    print(f"{rows} rows: planned {planned / 1e9:.0f} GFLOP, counted {counted.total / 1e9:.0f}")
    assert counted.total == pytest.approx(planned, rel=CLOSE)


class Flops(TorchDispatchMode):
    """torch's own formulas; its FlopCounterMode fails where a backward asks for a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(("rows", "layers"), [(8, []), (32, []), (32, [10, 20])])
def test_peak_memory_of_a_step(rows: int, layers: list[int], tmp_path: Path, ranks: Ranks) -> None:
    """All tensors that are alive at once, prefix pass, forward and backward, on top of the weights."""
    config = run_config(tmp_path, rows, {"reads": "both", "layers": layers}).model_copy(update={"remember_gib": 0.0})
    built = build(read_stage(config, "test"), ranks)
    batch = built.collator()([built.examples("train")[0][i] for i in range(rows)])
    shape = Shape.of(built.backbone.model, "none")
    memory = estimate(shape, [Load.of(batch)], 0, config, ALONE, "replicate", cuda=False).memory
    before = ("weights", "packed copy of weights", "remembered prefixes", "learned rows, moments, buffers")
    planned = sum(size for kind, size in memory.items() if kind not in before)
    built.model(batch)  # what is made once
    found = peak_tensor_bytes(lambda: total(built.model(batch).sums, count(batch), built.stage.weights).backward())
    print(f"{rows} rows: planned {planned / 2**20:.1f} MiB, peak {found / 2**20:.1f}")
    assert found == pytest.approx(planned, rel=CLOSE)


def run_config(output: Path, rows: int, head: dict[str, Any] | None = None) -> RunConfig:
    source = {"recipe": "rdkit-nci", "template": PROMPT, "target": "qed", "rows": {"train": 64, "valid": 4, "test": 4}}
    values = {
        "output": str(output), "backbone": {"model": "smollm2", "dtype": "bf16"},
        "tags": {"QED": {"kind": "function", "head": head or {}}}, "data": {"sources": [source]},
        "optim": {"steps": 1, "rows_per_step": rows, "rows_per_micro_batch": rows},
    }  # fmt: skip
    return parse_as(RunConfig, values, "test")
