"""A run is scored as it was trained, and computes nothing twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from tagllm.files import load_tensors
from tagllm.model.prefix import Piece, PrefixMemory
from tests.commands import Run, config, fails


def test_a_run_stays_in_the_dtype_that_it_began_in(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine another one may be fastest when the same command goes on, or when the run is scored."""
    file = config(folder, "dtype", backbone={"model": "backbone", "dtype": "auto"})
    for fastest in ("bf16", "fp32"):
        monkeypatch.setattr("tagllm.train.loop.fastest_dtype", lambda device, fastest=fastest: fastest)
        monkeypatch.setattr("tagllm.build.fastest_dtype", lambda device, fastest=fastest: fastest)
        result = run("train", file)
        assert result.exit_code == 0, result.stderr
    assert yaml.safe_load((folder / "runs/dtype/config.yaml").read_text())["backbone"]["dtype"] == "bf16"
    fails(run("train", file, "backbone.dtype=fp32"), "already holds another run", "backbone.dtype")
    scores = []
    for fastest in ("bf16", "fp32"):
        monkeypatch.setattr("tagllm.build.fastest_dtype", lambda device, fastest=fastest: fastest)
        assert run("eval", "runs/dtype").exit_code == 0
        scores.append(json.loads((folder / "runs/dtype/results.json").read_text())["metrics"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("mask", ["causal", "block"])
def test_eval_remembers_fields_that_come_again(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, mask: str
) -> None:
    """They stand by themselves under the block mask alone; what is remembered is what would be computed."""
    base = config(folder, "names", tags={"D": {"length": 2}}, data__template="A <D> {name}", data__target=[])
    assert run("train", base).exit_code == 0
    tags = {"D": {"load": "runs/names/library"}, "W": {"kind": "function", "length": 2, "head": {"reads": "both"}}}
    template = "The <D> {name} and <D> {smiles} by <W>"
    file = config(folder, f"again-{mask}", tags=tags, data__template=template, mask=mask)
    assert run("train", file).exit_code == 0
    recalled, recall = list[bool](), PrefixMemory.recall

    def noted(memory: PrefixMemory, key: bytes, device: torch.device) -> Piece | None:
        piece = recall(memory, key, device)
        recalled.append(piece is not None)
        return piece

    monkeypatch.setattr(PrefixMemory, "recall", noted)
    scores = []
    for gib in (1, 0):
        recalled.clear()
        result = run("eval", f"runs/again-{mask}", "evaluation.rows_per_batch=2", f"remember_gib={gib}")
        assert result.exit_code == 0, result.stderr
        assert any(recalled) == (gib > 0 and mask == "block")
        scores.append(json.loads((folder / f"runs/again-{mask}/results.json").read_text())["metrics"]["mse"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_what_training_left_for_probes_is_what_a_pass_would_find(run: Run, folder: Path) -> None:
    split = {"valid": 0.2, "test": 0.2}
    file = config(folder, "left", tags={"W": {"kind": "function", "length": 2, "head": {}}}, data__split=split)
    assert run("train", file).exit_code == 0
    left = sorted((folder / "runs/left").glob("probe-*.safetensors"))
    assert [path.stem for path in left] == ["probe-train", "probe-valid"]
    found = []
    for _ in range(2):
        result = run("eval", "runs/left")
        assert result.exit_code == 0, result.stderr
        found.append(json.loads((folder / "runs/left/results.json").read_text())["baselines"])
        for path in left:
            path.unlink(missing_ok=True)
    for probe in ("ridge_last", "ridge_mean", "ridge_both"):
        assert found[0][probe]["mse"] == pytest.approx(found[1][probe]["mse"], rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_pair_the_other_way_round_is_known_where_they_may_trade_places(
    run: Run, folder: Path, symmetric: bool
) -> None:
    """Three of the pairs to answer are training pairs turned; the split is by the first of each."""
    lines = [f"C{'C' * n}O,N{'C' * (n % 5)},{n % 7}" for n in range(30)]
    turned = [",".join([b, a, y]) for a, b, y in (lines[n].split(",") for n in (3, 7, 20))]
    for name, rows in (("pairs", lines), ("turned", [*turned, "NNO,OCN,3", "ONO,OCO,1"])):
        (folder / f"{name}.csv").write_text("a,b,y\n" + "\n".join(rows) + "\n")
    head = {"reads": "both", "pool": "each", "kernel": "anova", "symmetric": symmetric}
    tags = {"S": {"length": 2}, "W": {"kind": "function", "length": 2, "head": head}}
    path = {"train": str(folder / "pairs.csv"), "test": str(folder / "turned.csv")}
    source = {"path": path, "template": "<S> {a} and <S> {b} <W>", "target": "y", "split": {"by": ["a"], "valid": 0}}
    name = f"turned-{symmetric}"
    assert run("train", config(folder, name, tags=tags, data={"sources": [source]})).exit_code == 0
    told = run("eval", f"runs/{name}")
    assert told.exit_code == 0, told.output
    assert ("3 rows ask what a training row asks." in told.stdout) == symmetric


def test_rows_that_ask_what_a_training_row_asks_are_told_and_scored_without(run: Run, folder: Path) -> None:
    """Split by name: three molecules of the test rows have two names, one of them in training. They are broken there,
    which their prompt does not show."""
    lines = [f"{'C' * (n % 9 + 1)}{'N' * (n % 7)}O,x{n},{n % 13 + n / 60}" for n in range(40)]
    again = [f"{lines[n][0]} {lines[n][1:].split(',')[0]},y{n},{n + 0.5}" for n in (3, 7, 30)]
    new = [f"{'N' * (n + 1)}C{'O' * n},z{n},{n % 5}" for n in range(5)]
    for name, rows in (("known", lines), ("asked", [*again, *new])):
        (folder / f"{name}.csv").write_text("smiles,name,weight\n" + "\n".join(rows) + "\n")
    path = {"train": str(folder / "known.csv"), "test": str(folder / "asked.csv")}
    spaced = {"smiles": {"characters": "spaced"}}
    file = config(folder, "again", data__path=path, data__split={"by": ["name"], "valid": 0}, data__fields=spaced)
    assert run("train", file).exit_code == 0
    told = run("eval", "runs/again")
    assert told.exit_code == 0, told.output
    assert "3 rows ask what a training row asks." in told.stdout
    results = json.loads((folder / "runs/again/results.json").read_text())
    found, pairs = results["without_repeated"], load_tensors(folder / "runs/again/held_out.safetensors")
    new_n1 = (pairs["values_nK"] - pairs["targets_nK"])[3:]
    assert found["repeated"] == 3 and found["metrics"]["mse"] == pytest.approx(float(new_n1.square().mean()), rel=1e-5)
    assert found["metrics"]["mse"] != results["metrics"]["mse"] and set(found["intervals"]) <= set(found["metrics"])
    with (folder / "runs/again/held_out.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["row"] for row in rows] == [f"{folder / 'asked.csv'}, line {n + 2}" for n in range(8)]
    assert [float(row["target"]) for row in rows] == [float(line.split(",")[2]) for line in (*again, *new)]
    predicted = [float(row["predicted"]) for row in rows]
    assert predicted == pytest.approx(pairs["values_nK"][:, 0].tolist(), rel=1e-6)
    assert run("train", config(folder, "once")).exit_code == 0
    assert "ask what a training row asks" not in run("eval", "runs/once").stdout
