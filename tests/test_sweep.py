"""Sweeps: every combination and seed once, going on where it was cut off, one table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from typer.testing import CliRunner

from tagllm.cli import app
from tagllm.errors import UserError
from tagllm.sweep import Point, points_of, summaries
from tests import tiny

RUNNER = CliRunner()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny.save_backbone(tmp_path / "backbone")
    rows = [f"C{'C' * (n % 9)}O{'N' * (n % 4)},{n % 9 - n % 4}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("smiles,size\n" + "\n".join(dict.fromkeys(rows)) + "\n")
    values = {
        "output": str(tmp_path / "sweep"), "backbone": {"model": str(tmp_path / "backbone"), "dtype": "fp32"},
        "tags": {"Size": {"kind": "function", "length": 2, "head": {}}},
        "data": {"sources": [{"path": str(tmp_path / "rows.csv"), "template": "{smiles} <Size>", "target": "size"}]},
        "optim": {"steps": 2, "rows_per_step": 4, "rows_per_micro_batch": 4},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def test_every_combination_has_every_seed_and_a_folder_of_its_own(config: Path) -> None:
    points = points_of(config, [], ["tags.Size.length=1,2", "optim.betas=[0.9, 0.99],[0.8, 0.9]"], 3)
    assert len(points) == len({point.folder for point in points}) == 12
    assert points[0].values == {"tags.Size.length": 1, "optim.betas": [0.9, 0.99]}
    assert [point.seed for point in points[:4]] == [0, 1, 2, 0]
    assert all(point.folder.parent.name == "sweep" for point in points)


@pytest.mark.parametrize("text", ["tags.Size.length", "=1,2", "tags.Size.length=", "a=[1"])
def test_a_grid_that_cannot_be_read(config: Path, text: str) -> None:
    with pytest.raises(UserError, match="it must read key=value,value"):
        points_of(config, [], [text], 1)


def test_a_wrong_value_is_told_before_anything_runs(config: Path) -> None:
    with pytest.raises(UserError, match="tags.Size.lenght is no key") as caught:
        points_of(config, [], ["tags.Size.lenght=1,2"], 3)
    assert len(caught.value.problems) == 1
    assert not (config.parent / "sweep").exists()


def test_intervals_are_students(tmp_path: Path) -> None:
    values = [0.2, 0.4, 0.9]
    points = [Point({"a": 1}, seed, tmp_path / str(seed)) for seed in range(4)]
    for point, value in zip(points, values, strict=False):
        point.folder.mkdir()
        (point.folder / "results.json").write_text(json.dumps({"metrics": {"mse": value}}))
    (found,) = summaries(points)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found.runs == 3, "the fourth is not finished"
    assert found.metrics["mse"] == pytest.approx((np.mean(values), (high - low) / 2))


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_cut_off(config: Path) -> None:
    arguments = ["sweep", str(config), "--grid", "tags.Size.length=1,2", "--seeds", "1"]
    one = RUNNER.invoke(app, [*arguments, "--only", "1"])
    assert one.exit_code == 0, one.stderr
    done = config.parent / "sweep" / "tags.Size.length=2_seed=0" / "results.json"
    before = done.stat().st_mtime_ns
    whole = RUNNER.invoke(app, arguments)
    assert whole.exit_code == 0, whole.stderr
    assert done.stat().st_mtime_ns == before, "a finished run stays as it is"
    found = json.loads((config.parent / "sweep" / "sweep.json").read_text())["combinations"]
    assert [summary["runs"] for summary in found] == [1, 1]
    assert "mse" in found[0]["metrics"] and "tags.Size.length" in whole.stdout


def test_a_run_that_fails_is_named(config: Path) -> None:
    result = RUNNER.invoke(app, ["sweep", str(config), "data.sources[0].target=mass", "--seeds", "1"])
    assert result.exit_code == 2
    assert "seed=0: tagllm train left with 2: error:" in result.stderr and "mass" in result.stderr
