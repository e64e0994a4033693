"""The commands as a user meets them: results in files, and one clear line per mistake with exit status 2."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tagllm import __version__
from tagllm.origin import hardware
from tagllm.telling import HEARD_S
from tests.commands import Run, config, fails


def test_the_version_is_told(run: Run) -> None:
    told = run("--version")
    assert told.exit_code == 0 and told.output.strip() == __version__


@pytest.mark.parametrize(("rank", "local", "tells"), [(0, 0, True), (1, 1, False), (2, 0, True)])
def test_one_rank_of_each_node_tells_what_is_wrong_before_they_join(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: int, local: int, tells: bool
) -> None:
    """A file may be missing on one node alone."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # other tests have
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    result = run("train", "not-here.yaml")
    assert result.exit_code == 2
    assert ("not-here.yaml" in result.stderr) == tells


@pytest.mark.parametrize("tells", [True, False])
def test_a_silent_rank_leaves_behind_the_one_that_tells(run: Run, monkeypatch: pytest.MonkeyPatch, tells: bool) -> None:
    """A launcher ends all ranks with the first that fails."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", str(int(not tells)))
    slept = list[float]()
    monkeypatch.setattr("tagllm.telling.time.sleep", slept.append)
    assert run("train", "not-here.yaml").exit_code == 2
    assert slept == ([] if tells else [HEARD_S])


@pytest.mark.parametrize("command", ["check", "report", "inspect", "plan", "prepare", "sweep", "baseline"])
def test_what_works_in_one_process_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    fails(run(command, "davis"), f"{command}: WORLD_SIZE is 2", "Start it without a launcher")


def test_train_eval_predict(run: Run, folder: Path) -> None:
    file = config(folder, "whole")
    trained = run("train", file)
    assert trained.exit_code == 0
    assert f"device: {hardware()}; ranks: 1" in trained.stderr
    out = folder / "runs" / "whole"
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "origin.json", "splits.json", "metrics.jsonl", "tensorboard", "library", "last"} <= names
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert any("valid/mse" in line for line in lines)
    result = run("eval", out)
    assert result.exit_code == 0, result.stderr
    results = json.loads((out / "results.json").read_text())
    assert {"mse", "spearman", "r2"} <= results["metrics"].keys()
    assert results["baselines"].keys() == {
        "predict_mean", "ridge_last", "ridge_mean", "ridge_both", "nearest_row", "ridge_fingerprints",
        "boosting_fingerprints",
    }  # fmt: skip
    assert results["rows"] > 0

    bad = folder / "new.csv"
    bad.write_text('id,smiles,note\n1,CCO,"a, b"\n2,,empty\n3,CCN\n4,c1ccc,last\n')
    result = run("predict", out, bad, folder / "out.csv")
    assert result.exit_code == 0, result.stderr
    rows = list(csv.DictReader((folder / "out.csv").open()))
    assert [row["id"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["note"] == "a, b" and float(rows[0]["W"]) and rows[0]["tagllm_error"] == ""
    assert rows[1]["W"] == "" and "smiles is empty" in rows[1]["tagllm_error"]
    assert "line 4" in rows[2]["tagllm_error"]
    alone = folder / "one.csv"
    alone.write_text("id,smiles,note\n4,c1ccc,last\n")
    run("predict", out, alone, folder / "one_out.csv")
    assert float(next(csv.DictReader((folder / "one_out.csv").open()))["W"]) == pytest.approx(
        float(rows[3]["W"]), rel=1e-4
    )


MISTAKES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "unknown key": ({}, ["optim.tag_lrr=1"], ["tag_lrr", "Did you mean tag_lr?"]),
    "wrong type": ({}, ["seed=many"], ["seed is 'many'"]),
    "unknown tag": ({"data__template": "{smiles} is <w>"}, [], ['"w" is no tag', "Known: W"]),
    "missing column": ({"data__template": "{smilse} is <W>"}, [], ["no column 'smilse'", "smiles"]),
    "missing target": ({"data__target": "wait"}, [], ["no column 'wait'"]),
    "no such file": ({"data__path": "nowhere.csv"}, [], ["nowhere.csv"]),
    "empty split": ({"data__split": {"valid": 0.0001}}, [], ["valid"]),
    "too long": ({}, ["data.max_tokens=12"], ["no room", "max_unlabelled_share"]),
    "over the backbone": ({}, ["data.max_tokens=100000"], ["at most 256"]),
    "no backbone": ({}, ["backbone.model=nowhere/at-all", "backbone.dtype=fp32"], ["nowhere/at-all"]),
    "constant target": ({"data__target": "same"}, [], ["same"]),
    "bad override": ({}, ["seed"], ["key=value"]),
    "tag not closed": ({"data__template": "{smiles} is <W"}, [], ["<W has no > behind it", "write <W>"]),
    "folder is a file": ({}, ["output=rows.csv"], ["rows.csv: cannot be made", "is no folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(run: Run, folder: Path, mistake: str) -> None:
    changes, overrides, words = MISTAKES[mistake]
    if mistake == "constant target":
        (folder / "same.csv").write_text("smiles,same\n" + "".join(f"C{i},1.0\n" for i in range(30)))
        changes = {**changes, "data__path": str(folder / "same.csv")}
    file = config(folder, "mistake", **changes)
    shutil.rmtree(folder / "runs/mistake", ignore_errors=True)
    lines = fails(run("train", file, "--offline", *overrides), *words)
    assert len(lines) == 1
    assert not (folder / "runs/mistake/library").exists()
