"""Sweeps: every combination and seed once, going on where it was cut off, one table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from scipy import stats
from typer.testing import CliRunner

from tagllm.build import loaded_digest
from tagllm.cli import app
from tagllm.data.dataset import split_records
from tagllm.digits import digits
from tagllm.errors import UserError
from tagllm.evaluate.seeds import bounds, over_seeds
from tagllm.origin import ORIGIN
from tagllm.stage import read_stage
from tagllm.sweep.points import Point, Sweep
from tagllm.sweep.run import run_one, run_sweep
from tagllm.sweep.summary import summaries
from tagllm.tags import BackboneIdentity, Tag, TagLibrary
from tagllm.template import parse_template
from tests import tiny
from tests.distributed.launch import wait_until

RUNNER = CliRunner()


def points_of(
    path: Path, overrides: list[str], grid: list[str], seeds: int, variants: Path | None = None
) -> list[Point]:
    return Sweep.of(path, overrides, grid, seeds, variants).finals()


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
    assert points[0].values == points[0].shown == {"tags.Size.length": 1, "optim.betas": [0.9, 0.99]}
    assert [point.seed for point in points[:4]] == [0, 1, 2, 0]
    assert all(point.folder.parent.name == "sweep" for point in points)


def test_variants_have_names_and_are_crossed_with_the_grid(config: Path) -> None:
    file = config.parent / "variants.yaml"
    file.write_text(
        "full: {}\nno function tag: {tags.Size.absent: true}\nmean, of fields: {tags.Size.head.reads: mean}\n"
    )
    points = points_of(config, [], ["tags.length=1,2"], 2, file)
    assert len(points) == len({point.folder for point in points}) == 12
    assert points[4].shown == {"variant": "no function tag", "tags.length": 1}
    assert points[4].values == {"tags.Size.absent": True, "tags.length": 1}
    assert points[4].folder.name == "variant=no-function-tag_tags.length=1_seed=0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "it must give names, each with keys and values"),
        ("a: {tags.Size.lenght: 3}", "a: .*tags.Size.lenght is no key"),
        ("a b: {}\na-b: {tags.Size.absent: true}", "give one folder. Rename"),
        ("a: {", "cannot be read"),
    ],
)
def test_variants_that_are_wrong(text: str, message: str, config: Path) -> None:
    (config.parent / "variants.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        points_of(config, [], [], 1, config.parent / "variants.yaml")


@pytest.mark.parametrize("text", ["tags.Size.length", "=1,2", "tags.Size.length=", "a=[1"])
def test_a_grid_that_cannot_be_read(config: Path, text: str) -> None:
    with pytest.raises(UserError, match="it must read key=value,value"):
        points_of(config, [], [text], 1)


@pytest.mark.parametrize(
    ("grid", "tune"),
    [
        (["optim.tag_lr=1e-3", "optim.tag_lr=1e-2"], None), (["optim.tag_lr=1e-3,1e-2"], "optim.tag_lr=1e-4"),
    ],
)  # fmt: skip
def test_a_key_given_twice_is_refused(config: Path, grid: list[str], tune: str | None) -> None:
    """The values of the first one would never run."""
    with pytest.raises(UserError, match=r"optim.tag_lr is given 2 times. Give all of its values in one"):
        Sweep.of(config, [], grid, 1, tune=tune)


@pytest.mark.parametrize("text", ["seed=1,2", "output=a,b"])
def test_what_a_sweep_sets_itself_is_no_axis(config: Path, text: str) -> None:
    for grid, tune in (([text], None), ([], text)):
        with pytest.raises(UserError, match="a sweep sets .* itself. Use --seeds"):
            Sweep.of(config, [], grid, 1, tune=tune)
    (config.parent / "variants.yaml").write_text(f"a: {{{text.partition(',')[0].replace('=', ': ')}}}")
    with pytest.raises(UserError, match="variants.yaml: a: a sweep sets .* itself"):
        points_of(config, [], [], 1, config.parent / "variants.yaml")
    with pytest.raises(UserError, match="overrides: a sweep sets seed itself"):
        points_of(config, ["seed=5"], [], 1)


def test_values_of_all_kinds_have_folders_and_arrive_as_written(config: Path) -> None:
    templates = ["{smiles} 的大小 <Size>", "{smiles} 有多大 <Size> 𝛼"]
    key = "data.sources[0].template"
    points = points_of(config, [], [f"{key}={json.dumps(templates, ensure_ascii=False)[1:-1]}"], 2)
    assert len({point.folder for point in points}) == 4
    sweep = Sweep.of(config, [], [], 1)
    assert [sweep.config(point).data.sources[0].template for point in points[::2]] == templates
    (dated,) = points_of(config, [], ["backbone.model=2024-01-01"], 1)
    assert sweep.config(dated).backbone.model == "2024-01-01"
    texts = [f"{{smiles}} {letter * 300} <Size>" for letter in "ab"]
    long = points_of(config, [], [f"{key}={json.dumps(texts)[1:-1]}"], 1)
    assert len({point.folder for point in long}) == 2 and all(len(point.folder.name) < 220 for point in long)


def test_a_wrong_value_is_told_before_anything_runs(config: Path) -> None:
    with pytest.raises(UserError, match="tags.Size.lenght is no key") as caught:
        points_of(config, [], ["tags.Size.lenght=1,2"], 3)
    assert len(caught.value.problems) == 1
    assert not (config.parent / "sweep").exists()


def test_settings_that_contradict_each_other_are_told_before_anything_runs(config: Path) -> None:
    with pytest.raises(UserError, match="remember_gib is 1.0 .* engine.zero_stage is 3") as caught:
        run_sweep(Sweep.of(config, ["remember_gib=1"], ["engine.zero_stage=0,3", "tags.length=1,2"], 3), jobs=1)
    assert len(caught.value.problems) == 1 and not (config.parent / "sweep").exists()


def trained(sweep: Sweep, point: Point, losses: Sequence[float] = (), rows: dict[str, Any] | None = None) -> None:
    """What training leaves, as far as a sweep looks at it."""
    (point.folder / "library").mkdir(parents=True, exist_ok=True)
    (point.folder / "library" / "library.json").touch()
    config = sweep.config(point)
    stage = read_stage(config, str(sweep.path))
    (point.folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (point.folder / "origin.json").write_text(json.dumps({"loaded_tags": loaded_digest(stage)}))
    splits = rows or split_records(config.data, stage.templates, sweep.path.parent)
    (point.folder / "splits.json").write_text(json.dumps({name: {"splits": splits[name]} for name in splits}))
    lines = [{"step": at, "valid/loss": 2 * loss, "valid/loss_refitted": loss} for at, loss in enumerate(losses)]
    lines.append({"step": len(losses), "seconds": 1.0})
    (point.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finished(sweep: Sweep, point: Point, mse: float, losses: Sequence[float] = (), **other: Any) -> None:
    """The same and scored, `other` in its results."""
    trained(sweep, point, losses)
    config = sweep.config(point)
    scored = {
        **dict.fromkeys(ORIGIN, "x"), "metrics": {"mse": mse}, "split": "test", "config_digest": config.digest(),
        "scoring": config.scoring(), "dtype": "float32", "training": {}, **other,
    }  # fmt: skip
    (point.folder / "results.json").write_text(json.dumps(scored))


def test_intervals_are_students(config: Path) -> None:
    values = [0.2, 0.4, 0.9]
    sweep = Sweep.of(config, [], [], 4)
    for point, value in zip(sweep.finals(), values, strict=False):
        finished(sweep, point, value, commit="a1b2c3d")
    (found,) = summaries(sweep)
    assert [origin["commit"] for origin in found.origins] == ["a1b2c3d"] * 3
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found.runs == 3, "the fourth is not finished"
    assert found.metrics["mse"] == pytest.approx((np.mean(values), (high - low) / 2))


def test_what_was_scored_in_another_way_is_told_and_not_taken(config: Path) -> None:
    before = Sweep.of(config, [], [], 1)
    (point,) = before.finals()
    finished(before, point, 0.5)
    assert before.done(point)
    for override, key in (("evaluation.beams=4", "evaluation.beams 1 and not 4"), ("backbone.quantize=nf4", "nf4")):
        now = Sweep.of(config, [override], [], 1)
        with pytest.raises(UserError, match=f"{key}.*another output.*tagllm eval .* {override}"):
            now.done(now.finals()[0])


def test_seeds_of_other_rows_have_no_mean(config: Path) -> None:
    sweep = Sweep.of(config, [], [], 3)
    now = split_records(
        sweep.config(sweep.finals()[0]).data, [parse_template("{smiles} <Size>", {"Size": "function"})], config.parent
    )
    before = {"0": now["0"] | {"train": now["0"]["train"] | {"n": 1}}}
    for point, rows in zip(sweep.finals(), (now, now, before), strict=True):
        finished(sweep, point, 0.5)
        trained(sweep, point, rows=rows)
    assert sweep.done(sweep.finals()[1])
    with pytest.raises(UserError, match="seed=2: is trained already, and the data changed since"):
        summaries(sweep)


def test_a_tag_that_runs_begin_with_is_the_same_for_all_seeds(config: Path) -> None:
    """Where it is learned on, no library of a run has it as it was."""
    library, at = config.parent / "library", BackboneIdentity("tiny", "llama", 4, 4, "")

    def begin_with(value: float) -> None:
        TagLibrary(at).add(Tag("S", "domain", torch.full((2, 4), value))).save(library)

    enriched = [f"tags.S.load={library}", "tags.S.learn=true", "data.sources[0].template=<S> {smiles} <Size>"]
    sweep = Sweep.of(config, enriched, [], 2)
    first, _ = sweep.finals()
    begin_with(0.0)
    finished(sweep, first, 0.5)
    assert sweep.done(first)
    begin_with(1.0)
    with pytest.raises(UserError, match="is trained already, and the loaded tags changed since"):
        sweep.done(first)


def test_intervals_stay_within_what_a_metric_can_be() -> None:
    spread = over_seeds(
        [{"QED/mse": m, "accuracy": a, "r2": m - 1, "pearson": -a} for m, a in ((0.1, 0.9), (0.3, 1.0))]
    )
    half = 12.7062 * 0.1
    found = bounds(spread | {"of one": (0.5, None)})
    assert list(found) == ["QED/mse", "accuracy", "r2", "pearson"]
    assert found["QED/mse"] == pytest.approx((0, 0.2 + half), rel=1e-4)
    assert found["accuracy"] == pytest.approx((0.95 - half / 2, 1), rel=1e-4)
    assert found["r2"] == pytest.approx((-0.8 - half, -0.8 + half), rel=1e-4)
    assert found["pearson"] == pytest.approx((-1, -0.95 + half / 2), rel=1e-4)


def test_what_all_seeds_have_alike_has_no_interval_over_them(config: Path) -> None:
    sweep = Sweep.of(config, [], [], 3)
    for point in sweep.finals():
        finished(sweep, point, 0.25)
    assert summaries(sweep)[0].metrics == {"mse": (0.25, None)}


def test_only_this_very_run_scored_on_rows_to_test_is_finished(config: Path) -> None:
    sweep = Sweep.of(config, [], [], 2)
    first, second = sweep.finals()
    finished(sweep, first, 0.5)
    assert sweep.done(first) and not sweep.done(second)
    assert not Sweep.of(config, ["optim.tag_lr=0.3"], [], 2).done(first), "another config"
    finished(sweep, first, 0.5, split="valid")
    assert not sweep.done(first) and summaries(sweep)[0].runs == 0


def test_sweeps_of_one_config_stand_side_by_side(config: Path) -> None:
    names = [
        Sweep.of(config, [], grid, 1, tune=tune).name
        for grid in ([], ["tags.Size.length=1,2"])
        for tune in (None, "optim.tag_lr=1e-2")
    ]
    assert names == [
        "sweep.json", "sweep_optim.tag_lr.json", "sweep_tags.Size.length.json",
        "sweep_tags.Size.length_optim.tag_lr.json",
    ]  # fmt: skip


def test_every_combination_takes_the_value_that_is_best_on_validation(config: Path) -> None:
    """Not the one that is best on test; all seeds then run at it, the trial being the first of them."""
    sweep = Sweep.of(config, [], ["tags.Size.length=1,2"], 3, tune="optim.tag_lr=1e-3,1e-2,1e-1")
    assert len(sweep.trials()) == 6 and sweep.num_runs == 6 + 2 * 3
    with pytest.raises(UserError, match="no trial of .* is finished"):
        sweep.finals()
    valid = [[2.0, 3.0], [2.5, 1.0], [1.5, 1.5], [1.0, 2.0], [4.0, 3.0]]
    for point, losses in zip(sweep.trials(), valid, strict=False):
        trained(sweep, point, losses)
    assert not any(map(sweep.done, sweep.finals())), "trials are not scored"
    finished(sweep, sweep.finals()[0], 0.5, valid[1])
    assert [point.values["optim.tag_lr"] for point in sweep.finals()] == ["1e-2"] * 3 + ["1e-3"] * 3
    assert [point.seed for point in sweep.finals()] == [0, 1, 2] * 2
    assert sweep.run_number(1) == sweep.trials()[1]
    assert [sweep.run_number(at) for at in (6, 7, 8)] == sweep.finals()[:3]
    with pytest.raises(UserError, match=r"--only 11: trial .*seed=0 is not finished.* \(--only 5\), or take it out"):
        sweep.run_number(11)
    first, second = summaries(sweep)
    assert first.runs == 1 and first.metrics["mse"][0] == 0.5
    assert first.tried == {"1e-3": 2.0, "1e-2": 1.0, "1e-1": 1.5}
    assert second.tried == {"1e-3": 1.0, "1e-2": 3.0}, "what failed or is not there yet is no candidate"
    assert first.shown == {"tags.Size.length": 1, "optim.tag_lr": "1e-2"}


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_cut_off(config: Path) -> None:
    """With a tag that no library has and no run learns."""
    absent = [
        "tags.S.absent=true",
        "data.sources[0].template=<S> {smiles} <Size>",
    ]
    arguments = ["sweep", str(config), *absent, "--grid", "tags.Size.length=1,2", "--seeds", "1"]
    assert points_of(config, [], ["tags.Size.length=1,2"], 1)[1].folder.name == "tags.Size.length=2_seed=0"
    one = RUNNER.invoke(app, [*arguments, "--only", "1"])
    assert one.exit_code == 0, one.stderr
    done = config.parent / "sweep" / "tags.Size.length=2_seed=0" / "results.json"
    before = done.stat().st_mtime_ns
    whole = RUNNER.invoke(app, [*arguments, "--jobs", "2"])
    assert whole.exit_code == 0, whole.stderr
    assert done.stat().st_mtime_ns == before, "a finished run stays as it is"
    found = json.loads((config.parent / "sweep" / "sweep_tags.Size.length.json").read_text())["combinations"]
    assert [summary["runs"] for summary in found] == [1, 1]
    assert [summary["folders"] for summary in found] == [[f"tags.Size.length={n}_seed=0"] for n in (1, 2)]
    for count, summary in zip((1, 2), found, strict=True):
        (told,) = [line for line in whole.stdout.splitlines() if f"tags.Size.length={count} " in line]
        assert all(f"{name} {digits(mean, 4)}" in told for name, (mean, _) in summary["metrics"].items())
    rows = config.parent / "rows.csv"
    rows.write_text(rows.read_text().replace(",1\n", ",1.5\n", 1))
    corrected = RUNNER.invoke(app, arguments)
    assert corrected.exit_code == 2 and "the data changed since" in corrected.stderr


@pytest.mark.slow
def test_a_stop_reaches_the_run_and_the_next_is_not_begun(config: Path) -> None:
    """SIGTERM goes to the sweep alone, as `kill` sends it: the run saves, and the same command goes on from there."""
    command = [sys.executable, "-m", "tagllm", "sweep", str(config), "optim.steps=100000", "--seeds", "2"]
    first, second = (point.folder for point in points_of(config, ["optim.steps=100000"], [], 2))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as sweep:
        metrics = first / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0, [sweep])
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(timeout=120) == 128 + signal.SIGTERM
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert (first / "checkpoints" / f"step-{steps[-1]:08d}").is_dir() and not second.exists()


@pytest.mark.slow
def test_a_run_that_was_killed_is_named_and_the_other_is_finished(config: Path) -> None:
    """As the kernel does where memory runs out, two runs side by side."""
    overrides = ["optim.steps=400", "evaluation.every_steps=400", "checkpoint.every_steps=20"]
    command = [sys.executable, "-m", "tagllm", "sweep", str(config), *overrides, "--seeds", "2", "--jobs", "2"]
    first, second = (point.folder for point in points_of(config, overrides, [], 2))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as sweep:
        wait_until(lambda: any((first / "checkpoints").glob("step-*")), [sweep])
        (victim,) = (child for child in psutil.Process(sweep.pid).children() if f"output={first}" in child.cmdline())
        victim.kill()
        told = sweep.communicate(timeout=120)[1]
    assert sweep.returncode == 2
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert str(first) in line and "train was killed" in line and "memory" in line and "--jobs" in line
    assert (second / "results.json").is_file() and not (first / "results.json").exists()


def test_a_run_that_fails_is_named(config: Path) -> None:
    """And a table of before stays."""
    (config.parent / "sweep").mkdir()
    (config.parent / "sweep/sweep.json").write_text("before")
    result = RUNNER.invoke(app, ["sweep", str(config), "data.sources[0].target=mass", "--seeds", "1"])
    assert result.exit_code == 2
    assert "seed=0: tagllm train left with 2: error:" in result.stderr and "mass" in result.stderr
    assert (config.parent / "sweep/sweep.json").read_text() == "before"


@pytest.mark.slow
def test_a_tuned_sweep_from_the_command_line(config: Path) -> None:
    tune = ["--tune", "optim.tag_lr=1e-3,1e30", "--seeds", "2"]
    result = RUNNER.invoke(app, ["sweep", str(config), *tune])
    assert result.exit_code == 0, result.stderr
    document = json.loads((config.parent / "sweep" / "sweep_optim.tag_lr.json").read_text())
    (found,) = document["combinations"]
    assert found["shown"] == {"optim.tag_lr": "1e-3"} and found["runs"] == 2
    assert {"command", "commit", "hardware", "versions", "date"} <= set(document)
    assert document["seeds"] == [0, 1] and len(found["tried"]) == 2
    lost = config.parent / "sweep" / "optim.tag_lr=1e30_seed=0"
    assert (lost / "library").is_dir() and not (lost / "results.json").exists(), "test rows are for what was chosen"


def test_without_rows_for_validation_nothing_can_be_chosen(config: Path) -> None:
    sweep = Sweep.of(config, ["data.sources[0].split.valid=0"], [], 1, tune="optim.tag_lr=1e-3")
    finished(sweep, sweep.trials()[0], 0.5)
    with pytest.raises(UserError, match="has no rows for validation"):
        sweep.finals()


def test_a_rate_at_which_the_loss_on_validation_is_no_number_is_not_chosen(config: Path) -> None:
    sweep = Sweep.of(config, [], [], 1, tune="optim.tag_lr=1e-3,1e9")
    small, large = sweep.trials()
    trained(sweep, large)
    with pytest.raises(UserError, match="with a finite loss on validation"):
        sweep.finals()
    trained(sweep, small, [2.0])
    assert [point.values["optim.tag_lr"] for point in sweep.finals()] == ["1e-3"]


@pytest.mark.parametrize(("tune", "split"), [(None, "test"), ("optim.tag_lr=1e-3", "valid")])
def test_a_split_that_no_source_has_is_told_before_anything_runs(config: Path, tune: str | None, split: str) -> None:
    sweep = Sweep.of(config, [f"data.sources.0.split.{split}=0"], [], 2, tune=tune)
    with pytest.raises(UserError, match=f"no source has rows for {split}"):
        run_sweep(sweep, jobs=1)
    with pytest.raises(UserError, match=f"no source has rows for {split}"):
        run_one(sweep, 0)
    assert not (config.parent / "sweep").exists()


def test_rounding_is_no_spread() -> None:
    """A fit on the same rows differs by so little from run to run."""
    assert over_seeds([{"mse": value} for value in (1874.79, 1874.80, 1874.80)])["mse"][1] is None
    assert over_seeds([{"mse": value} for value in (1874.8, 1874.8, 1880.0)])["mse"][1] is not None


def test_what_there_is_to_say_of_each_seed_is_kept(config: Path) -> None:
    sweep = Sweep.of(config, [], [], 2)
    for point, note in zip(sweep.finals(), ("", "from the fields alone"), strict=True):
        finished(sweep, point, 0.5 + point.seed, note=note)
    (found,) = summaries(sweep)
    assert found.notes == ["", "from the fields alone"] and found.each == [{"mse": 0.5}, {"mse": 1.5}]
