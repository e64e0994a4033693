"""Several heads in one run: each learns from its own rows and is measured on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tagllm.config import HeadConfig
from tagllm.data.encode import TagLayout
from tagllm.evaluate.metrics import value_metrics
from tagllm.evaluate.passes import Pass
from tagllm.head import Head
from tagllm.model.tagged import TaggedModel
from tagllm.train.gradient_free import GradientFree
from tests import tiny
from tests.test_cli import Run, config, folder, run

__all__ = ["folder", "run"]  # fixtures
NUMBER: dict[str, Any] = {"kind": "function", "length": 2, "head": {"type": "regression"}}
LETTER = {"kind": "function", "length": 2, "head": {"type": "classification", "classes": ["a", "b"]}}
NAME = {"kind": "function", "length": 2, "head": {"type": "classification", "classes": [f"x{i}" for i in range(7)]}}
PAIRS = [
    ({"W": NUMBER, "K": LETTER}, {"W": ("weight", "mse"), "K": ("kind", "accuracy")}),
    ({"N": NAME, "K": LETTER}, {"N": ("name", "accuracy"), "K": ("kind", "accuracy")}),
]


def of_two(folder: Path, name: str, tags: dict[str, Any], targets: dict[str, tuple[str, str]]) -> Path:
    file = config(folder, name, tags=tags)
    values = yaml.safe_load(file.read_text())
    values["data"]["sources"] = [
        {"path": str(folder / "rows.csv"), "template": f"The molecule {{smiles}} is <{tag}>", "target": target}
        for tag, (target, _) in targets.items()
    ]
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(("tags", "targets"), PAIRS, ids=["number and class", "classes of different number"])
def test_each_head_is_measured_on_its_own_rows(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tags: dict[str, Any], targets: dict[str, tuple[str, str]]
) -> None:
    passes: list[Pass] = []
    scored = GradientFree.scalars
    monkeypatch.setattr(GradientFree, "scalars", lambda *args: passes.append(args[1]) or scored(*args))
    name = "-".join(tags)
    result = run("train", of_two(folder, name, tags, targets))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    found, result = next(line for line in reversed(lines) if "valid/loss" in line), passes[-1]
    half = len(result.targets_nK) // 2  # both sources are of the same rows
    for at, (tag, (_, metric)) in enumerate(targets.items()):
        spec, rows = tags[tag]["head"], slice(at * half, (at + 1) * half)
        width = len(spec.get("classes", "1"))
        expected = value_metrics(result.values_nK[rows, :width], result.targets_nK[rows, :width], "classes" in spec)
        assert found[f"valid/{tag}/{metric}"] == pytest.approx(expected[metric])
        assert {key for key in found if key.startswith(f"valid/{tag}/")} == {f"valid/{tag}/{key}" for key in expected}
    assert "valid/mse" not in found and "valid/accuracy" not in found


def test_a_number_is_no_class_of_another_head() -> None:
    """A regression's target would be the index of a class, far beyond those there are; its loss stays its own."""
    specs = {"F": HeadConfig(reads="both"), "Text": HeadConfig(type="classification", classes=["a", "b"])}
    of = TagLayout.of(tiny.VOCABULARY, tiny.KINDS, dict.fromkeys(tiny.KINDS, 3), ("F", "Text"), specs)
    alone = of._replace(heads={"F": specs["F"]})
    random = np.random.default_rng(0)
    row = tiny.example(of, (4, "Frozen", "~9", "F"), random)._replace(target=np.array([-7.5], np.float32))
    losses = []
    for layout in (of, alone):
        tags = tiny.tags(of._replace(heads={}))
        for name, spec in layout.heads.items():
            tags[name] = replace(tags[name], head=Head.new(spec, tiny.HIDDEN))
        model = TaggedModel(tiny.backbone(), tags, layout)
        losses.append(model(tiny.collator(layout)([row])).sums.value.item())
    assert losses == [7.5**2, 7.5**2]
