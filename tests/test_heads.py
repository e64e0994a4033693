"""Several heads in one run: each learns from its own rows and is measured on them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from tagllm import evaluation
from tagllm.config import HeadConfig
from tagllm.data.layout import TagLayout
from tagllm.evaluate.metrics import value_metrics
from tagllm.evaluate.passes import Pass
from tagllm.head import Head
from tagllm.model.tagged import TaggedModel
from tagllm.report.collect import metrics_of
from tagllm.train.validation import Validation
from tests import tiny
from tests.commands import Run, config, fails

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
    scored = Validation.scalars
    monkeypatch.setattr(Validation, "scalars", lambda *args: passes.append(args[1]) or scored(*args))
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


def test_eval_scores_each_head_on_its_own_rows(run: Run, folder: Path) -> None:
    """And beside each the baselines of a run that has it alone."""
    tags, targets = PAIRS[0]
    assert run("train", of_two(folder, "both", tags, targets)).exit_code == 0
    for tag, (target, _) in targets.items():
        prompt = f"The molecule {{smiles}} is <{tag}>"
        alone = config(folder, f"alone-{tag}", tags={tag: tags[tag]}, data__template=prompt, data__target=target)
        assert run("train", alone).exit_code == 0
        assert run("eval", f"runs/alone-{tag}").exit_code == 0
    told = run("eval", "runs/both")
    assert told.exit_code == 0, told.output
    results = json.loads((folder / "runs/both/results.json").read_text())
    assert {"W/mse", "K/accuracy"} <= set(results["metrics"]) and "mse" not in results["metrics"]
    assert {"W/mse", "K/accuracy"} <= set(results["intervals"])
    for tag, (_, metric) in targets.items():
        alone = json.loads((folder / f"runs/alone-{tag}/results.json").read_text())
        for part in ("baselines", "baseline_intervals"):
            mine = {name: of for name, of in results[part].items() if f"{tag}/{metric}" in of}
            assert mine.keys() == alone[part].keys() and len(mine) > 3
            for name, of in alone[part].items():
                for key, value in of.items():
                    assert mine[name][f"{tag}/{key}"] == pytest.approx(value, rel=1e-4), (name, key)
    assert metrics_of({"tag": results["metrics"]})[:2] == ["K/accuracy", "K/f1"]
    both = ["--tag", "W", "--template", "The molecule {smiles} is <W> or <K>"]
    told = run("predict", "runs/both", folder / "rows.csv", folder / "w.csv", *both)
    fails(told, "<K>, <W> all have heads", "Take out all but <W>")


def test_one_held_out_row_of_two_targets_is_scored_and_reported(run: Run, folder: Path) -> None:
    """By its errors, on average and of each target; there is nothing to draw an interval from."""
    with (folder / "rows.csv").open() as stream:
        rows = [[row["smiles"], row["weight"], f"{1000 * len(row['smiles'])}"] for row in csv.DictReader(stream)]
    for name, some in {"train": rows[:40], "valid": rows[40:59], "test": rows[59:]}.items():
        lines = [",".join(row) for row in [["smiles", "weight", "thousands"], *some]]
        (folder / f"two-{name}.csv").write_text("\n".join(lines))
    tags = {"W": {"kind": "function", "length": 2, "head": {"outputs": 2}}}
    paths = {name: str(folder / f"two-{name}.csv") for name in ("train", "valid", "test")}
    file = config(folder, "one-row", tags=tags, data__path=paths, data__target=["weight", "thousands"])
    assert run("train", file).exit_code == 0
    told = run("eval", "runs/one-row")
    assert told.exit_code == 0, told.output
    results = json.loads((folder / "runs/one-row/results.json").read_text())
    wanted = {f"{at}{metric}" for at in ("", "weight/", "thousands/") for metric in ("mse", "mae")}
    assert set(results["metrics"]) == wanted and results["intervals"] == {}
    assert all(set(metrics) == wanted for metrics in results["baselines"].values())
    told = run("report", "runs/one-row", "--out", "report-one-row")
    assert told.exit_code == 0, told.output
    assert "| weight/mse |" in (folder / "report-one-row/report.md").read_text()


def test_a_head_without_held_out_rows_leaves_the_others(run: Run, folder: Path) -> None:
    tags, targets = PAIRS[0]
    file = of_two(folder, "untested", tags, targets)
    values = yaml.safe_load(file.read_text())
    (folder / "copy.csv").write_text((folder / "rows.csv").read_text())
    values["data"]["sources"][1] |= {"path": str(folder / "copy.csv"), "split": {"test": 0}}
    values["data"]["sources"].append(
        {"path": str(folder / "third.csv"), "split": {"test": 0}, "template": "{smiles} <T> {output}", "output": "name"}
    )
    values["tags"]["T"] = {"kind": "function", "length": 2}
    (folder / "third.csv").write_text((folder / "rows.csv").read_text())
    file.write_text(yaml.safe_dump(values))
    assert run("train", file).exit_code == 0
    told = run("eval", "runs/untested")
    assert told.exit_code == 0, told.output
    results = json.loads((folder / "runs/untested/results.json").read_text())
    assert "W/mse" in results["baselines"]["ridge_mean"] and not any(key.startswith("K/") for key in results["metrics"])


def test_a_head_answers_in_the_prompt_of_its_run_with_fewest_fields(run: Run, folder: Path) -> None:
    """It reads two means, of which rows of the first source have one."""
    head = {"type": "regression", "reads": "both", "pool": "apart"}
    tags = {"S": {"length": 2}, "W": {"kind": "function", "length": 2, "head": head}}
    file = config(folder, "fewer", tags=tags)
    values = yaml.safe_load(file.read_text())
    source = values["data"]["sources"][0] | {"split": {"by": "smiles"}}
    prompts = "The <S> {smiles} weighs <W>", "The <S> {smiles}, {name}, weighs <W>"
    values["data"]["sources"] = [source | {"template": prompt} for prompt in prompts]
    file.write_text(yaml.safe_dump(values))
    assert run("train", file).exit_code == 0
    told = run("predict", "runs/fewer", folder / "rows.csv", folder / "w.csv")
    assert told.exit_code == 0, told.output
    assert run("eval", "runs/fewer").exit_code == 0
    held_out = load_file(folder / "runs/fewer/held_out.safetensors")
    with (folder / "w.csv").open() as stream:
        answers = {round(float(row["weight"]), 3): float(row["W"]) for row in csv.DictReader(stream)}
    half = len(held_out["values_nK"]) // 2
    for value, target in zip(held_out["values_nK"][:half, 0], held_out["targets_nK"][:half, 0], strict=True):
        assert answers[round(float(target), 3)] == pytest.approx(float(value), rel=1e-3)


def test_each_head_has_trained_baselines_on_its_own_rows(run: Run, folder: Path) -> None:
    pytest.importorskip("peft")
    from tagllm.baselines.methods import METHODS
    from tagllm.baselines.task import open_tasks

    tags, targets = PAIRS[0]
    assert run("train", of_two(folder, "trained", tags, targets)).exit_code == 0
    assert run("eval", "runs/trained").exit_code == 0
    told = run("baseline", "runs/trained", "--method", "lora", "--lr", "1e-3", "--budget-s", "0.5")
    assert told.exit_code == 0, told.output
    results = json.loads((folder / "runs/trained/results.json").read_text())
    of_lora = results["baselines"]["LoRA + head"]
    assert set(of_lora) == set(results["metrics"]) and set(results["trained_baselines"]) == {
        "LoRA + head, W", "LoRA + head, K",
    }  # fmt: skip
    tasks = {task.tag: task for task in open_tasks(Path("runs/trained"))}
    for tag, (target, metric) in targets.items():
        found = json.loads((folder / f"runs/trained/baselines/lora-{tag}.json").read_text())
        assert found["metrics"][metric] == of_lora[f"{tag}/{metric}"]
        assert found["final"]["lr=0.001,seed=0"]["test_rows"] == results["rows"] / 2
        file = config(folder, f"only-{tag}", tags={tag: tags[tag]}, data__target=target,
                      data__template=f"The molecule {{smiles}} is <{tag}>")  # fmt: skip
        assert run("train", file).exit_code == 0
        (alone,) = open_tasks(Path(f"runs/only-{tag}"))
        mine, expected = (task.rows("test", METHODS["lora"]) for task in (tasks[tag], alone))
        assert [row.ids.tolist() for row in mine] == [row.ids.tolist() for row in expected]
        assert [row.target.tolist() for row in mine] == [row.target.tolist() for row in expected]
        assert tasks[tag].virtual == alone.virtual == 2


def test_a_head_of_classes_stands_beside_frequencies_and_probes(run: Run, folder: Path) -> None:
    file = config(folder, "letters", tags={"K": LETTER}, data__template="{smiles} <K>", data__target=["kind"])
    assert run("train", file).exit_code == 0
    assert run("eval", "runs/letters").exit_code == 0
    results = json.loads((folder / "runs/letters/results.json").read_text())
    assert set(results["baselines"]) == {
        "predict_frequencies", "logistic_last", "logistic_mean", "logistic_both",
        "nearest_row", "logistic_fingerprints", "boosting_fingerprints",
    }  # fmt: skip
    assert all({"accuracy", "cross_entropy"} <= set(metrics) for metrics in results["baselines"].values())
    assert results["baseline_intervals"].keys() == results["baselines"].keys()


def test_a_head_is_fitted_without_rows_for_validation_too(run: Run, folder: Path) -> None:
    """Of three steps it has learned next to nothing; the baselines beside it are fitted either way."""
    mse = {}
    for refit in (True, False):
        head = {"type": "regression", "reads": "both", "refit": refit}
        tags = {"W": {"kind": "function", "length": 2, "head": head}}
        file = config(folder, f"refit-{refit}", tags=tags, data__split={"valid": 0, "test": 0.3})
        assert run("train", file).exit_code == 0
        assert run("eval", f"runs/refit-{refit}").exit_code == 0
        mse[refit] = json.loads((folder / f"runs/refit-{refit}/results.json").read_text())["metrics"]["mse"]
    assert mse[True] < 0.7 * mse[False]


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


def test_probes_of_a_head_are_fitted_on_as_many_of_its_rows_as_the_head(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags, targets = PAIRS[1]
    assert run("train", of_two(folder, "probes", tags, targets)).exit_code == 0
    monkeypatch.setattr(evaluation, "FIT_ROWS", 12)
    assert run("eval", "runs/probes").exit_code == 0
    results = json.loads((folder / "runs/probes/results.json").read_text())
    assert {name: results[f"{name}/probe_rows"] for name in tags} == dict.fromkeys(tags, 12)


def test_rows_without_the_function_tag_stand_beside_those_of_a_head(run: Run, folder: Path) -> None:
    """Probes read the state before the tag, and these rows have none; some batches hold no other."""
    tags = {"D": {"length": 2}, "W": {"kind": "function", "length": 2, "head": {"reads": "both"}}}
    file = config(folder, "unlabelled", tags=tags, loss={"span": 0.1, "value": 1.0})
    values = yaml.safe_load(file.read_text())
    source = {"path": str(folder / "rows.csv"), "split": {"by": "smiles"}}
    values["data"]["sources"] = [
        {**source, "template": "<D> {smiles} weighs <W>", "target": "weight"}, {**source, "template": "so <D> {name}"},
    ]  # fmt: skip
    values["evaluation"] |= {"rows_per_batch": 2}
    file.write_text(yaml.safe_dump(values))
    assert run("train", file).exit_code == 0
    told = run("eval", "runs/unlabelled")
    assert told.exit_code == 0, told.output
    metrics = json.loads((folder / "runs/unlabelled/results.json").read_text())["metrics"]
    assert {"mse", "span_nats"} <= set(metrics)
