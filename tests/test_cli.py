"""The commands as a user meets them: results in files, and one clear line per mistake with exit status 2."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from tagllm import __version__
from tagllm.cli import app
from tagllm.origin import hardware
from tagllm.tags import Tag, TagLibrary
from tagllm.telling import HEARD_S
from tagllm.train.signals import EXIT_STOPPED, StopAsked
from tagllm.train.validation import Validation
from tests import tiny

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone and a small table of molecules, `weight` being a simple function of the text."""
    root = tmp_path_factory.mktemp("cli")
    tiny.save_backbone(root / "backbone")
    random = np.random.default_rng(0)
    with (root / "rows.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["smiles", "weight", "kind", "name"])
        for i in range(60):
            smiles = "".join(random.choice(list("CNOc1()="), random.integers(4, 12)))
            writer.writerow([f"{smiles}{i}", f"{len(smiles) + random.normal() * 0.1:.3f}", "ab"[i % 2], f"x{i % 7}"])
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TAGLLM_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def config(folder: Path, name: str = "config", **changes: Any) -> Path:
    """A regression run; `changes` replace whole sections, `data__x=` one key of a section."""
    values: dict[str, Any] = {
        "output": f"runs/{name}",
        "backbone": {"model": str(folder / "backbone"), "dtype": "fp32"},
        "tags": {"W": {"kind": "function", "length": 2, "head": {"type": "regression"}}},
        "data": {"sources": [
            {"path": str(folder / "rows.csv"), "template": "The molecule {smiles} weighs <W>", "target": "weight"},
        ]},
        "optim": {"steps": 3, "rows_per_step": 8, "rows_per_micro_batch": 4},
        "evaluation": {"every_steps": 2},
    }  # fmt: skip
    for key, change in changes.items():
        section, _, inner = key.partition("__")
        if inner in ("path", "template", "target", "rows", "split", "fields", "max_characters", "output"):
            values["data"]["sources"][0][inner] = change
        elif inner:
            values[section][inner] = change
        else:
            values[section] = change
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def fails(result: Result, *words: str) -> list[str]:
    """Exit status 2, only lines that begin with `error:`, and every word is there."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip() and "warning" not in line]
    assert lines and all(line.startswith("error: ") for line in lines), result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    return lines


def test_the_version_is_told(run: Run) -> None:
    told = run("--version")
    assert told.exit_code == 0 and told.output.strip() == __version__


def test_check_says_what_will_happen_and_loads_no_weights(run: Run, folder: Path) -> None:
    result = run("check", config(folder, backbone__model="no-such/model"))
    assert result.exit_code == 0, result.stderr
    assert "<W>" in result.stdout


def test_check_reads_the_rows_where_that_is_asked_and_no_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "backbone", tmp_path / "backbone")
    (tmp_path / "backbone" / "model.safetensors").unlink()
    table = tmp_path / "rows.csv"
    table.write_text((folder / "rows.csv").read_text() + "C,heavy,a,nobody\n")
    file = config(folder, "rows", backbone={"model": str(tmp_path / "backbone")}, data__path=str(table))
    fails(run("check", file, "--rows"), "rows.csv, line 62: weight is 'heavy'; it must be a finite number")
    told = run("check", file, "--rows", "data.on_bad_row=skip")
    assert told.exit_code == 0, told.stderr
    found = re.search(r"rows\.csv\): train (\d+), valid (\d+), test (\d+); (\d+) tokens on average, (\d+)", told.stdout)
    assert found and sum(map(int, found.groups()[:3])) == 60 and 4 < int(found[4]) <= int(found[5])
    assert "1 rows cannot be used" in told.stdout and "line 62: weight is 'heavy'" in told.stdout


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


@pytest.mark.parametrize("command", ["check", "report", "inspect", "plan", "prepare"])
def test_what_works_in_one_process_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    fails(run(command, "davis"), f"{command}: WORLD_SIZE is 2", "Start it without a launcher")


def test_a_rank_that_is_to_use_the_cpu_sees_no_gpu(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run("check", config(folder)).exit_code == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("template", "noted"),
    [("<W> of {smiles}", "before <W>"), ("{smiles} <W>", ""), ("{smiles} <W> {kind}", "")],
)
def test_an_answer_that_no_field_stands_before_is_noted(run: Run, folder: Path, template: str, noted: str) -> None:
    """It is the same for every row."""
    told = run("check", config(folder, data__template=template))
    assert told.exit_code == 0, told.output
    assert ("no field stands" in told.output) == bool(noted) and noted in told.output


def test_a_warm_up_as_long_as_the_run_is_noted(run: Run, folder: Path) -> None:
    for steps, noted in ((4, True), (40, False)):
        told = run("check", config(folder), f"optim.steps={steps}", "optim.warmup_steps=4")
        assert told.exit_code == 0 and ("no step has the learning rates" in told.stdout) == noted, told.output


def test_check_reports_every_mistake_at_once(run: Run, folder: Path) -> None:
    lines = fails(
        run("check", config(folder, data__template="{smilse} and <W>", optim__rows_per_step=10), "--ranks", 4),
        "smilse",
        "rows_per_step",
    )
    assert len(lines) == 2


def test_two_templates_over_one_file_are_held_out_by_one_key(run: Run, folder: Path) -> None:
    file, text = config(folder, "keys"), "data.sources.1: is split by name, and data.sources.0, which has the same rows"
    values = yaml.safe_load(file.read_text())
    values["data"]["sources"].append(values["data"]["sources"][0] | {"template": "{name} weighs <W>"})
    file.write_text(yaml.safe_dump(values))
    fails(run("check", file), f"{file}: {text}", "Set split.by in both")
    fails(run("train", file), text)
    both = [f"data.sources[{at}].split.by=smiles" for at in (0, 1)]
    assert run("check", file, *both).exit_code == 0


def test_a_run_that_was_stopped_behind_its_last_step_ends_once(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last fit may take minutes: it is done again after a stop in it, and never after it was done."""
    file, fits = config(folder, "late"), Validation.probes

    def stopped(*_: Any) -> None:
        raise StopAsked

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "probes", stopped)
        assert run("train", file).exit_code == EXIT_STOPPED
    assert not (folder / "runs/late/library").exists()
    for times in (1, 0):
        done = list[int]()
        monkeypatch.setattr(Validation, "probes", lambda *passes, done=done: done.append(1) or fits(*passes))
        assert run("train", file).exit_code == 0
        assert len(done) == times
    assert (folder / "runs/late/library").exists()


def test_the_last_steps_are_saved_before_the_last_fit(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Validation, "probes", failing)
    assert isinstance(run("train", config(folder, "unfitted")).exception, MemoryError)
    assert [path.name for path in (folder / "runs/unfitted/checkpoints").glob("step-*")] == ["step-00000003"]


@pytest.mark.parametrize("cut", ["held_out", "seen_by_heads"])
def test_an_evaluation_that_a_stop_cut_off_is_made_by_the_next_process(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """In either of its passes: no score is left out, and the best state is the same one."""

    def stopped(*_: Any) -> None:
        raise StopAsked

    assert run("train", config(folder, "unstopped")).exit_code == 0
    file = config(folder, f"cut-{cut}")
    with monkeypatch.context() as patch:
        patch.setattr(Validation, cut, stopped)
        assert run("train", file).exit_code == EXIT_STOPPED
    assert run("train", file).exit_code == 0
    (found, progress), (expected, its) = (_scores(folder / "runs" / name) for name in (f"cut-{cut}", "unstopped"))
    assert found == expected and len(found) == 2
    assert progress == its


def _scores(run: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """What was logged of held-out rows, and the progress in the newest checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [{k: v for k, v in line.items() if k == "step" or k.startswith("valid/")} for line in lines]
    newest = max((run / "checkpoints").glob("step-*"))
    return [one for one in scores if "valid/loss" in one], json.loads((newest / "progress.json").read_text())


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


def test_classification(run: Run, folder: Path) -> None:
    tags = {"K": {"kind": "function", "length": 2, "head": {"type": "classification", "classes": ["a", "b"]}}}
    file = config(folder, "classes", tags=tags, data__template="{smiles} is <K>", data__target="kind")
    assert run("train", file).exit_code == 0
    assert run("eval", "runs/classes").exit_code == 0
    accuracy = json.loads((folder / "runs/classes/results.json").read_text())["metrics"]["accuracy"]
    held_out = list(csv.DictReader((folder / "runs/classes/held_out.csv").open()))
    assert {row["target"] for row in held_out} == {"a", "b"}
    assert accuracy == pytest.approx(sum(row["target"] == row["predicted"] for row in held_out) / len(held_out))
    assert run("predict", "runs/classes", folder / "rows.csv", folder / "k.jsonl").exit_code == 0
    rows = [json.loads(line) for line in (folder / "k.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and all(row["K"] in "ab" and 0.5 <= row[f"K_probability_{row['K']}"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("kinds", "classes", "told"),
    [("ab", "abc", "no training row is of c"), ("a", "ab", "all training rows are of the class a"), ("ab", "ab", "")],
)
def test_classes_that_nothing_teaches_are_told(run: Run, folder: Path, kinds: str, classes: str, told: str) -> None:
    rows = "".join(f"C{i}O,{kinds[i % len(kinds)]}\n" for i in range(40))
    (folder / "kinds.csv").write_text(f"smiles,kind\n{rows}")
    tags = {"K": {"kind": "function", "length": 2, "head": {"type": "classification", "classes": [*classes]}}}
    source = {"path": str(folder / "kinds.csv"), "template": "{smiles} is <K>", "target": "kind"}
    file = config(folder, f"kinds-{kinds}-{classes}", tags=tags, data={"sources": [source]})
    found = [run("check", "--rows", file), run("train", file)]
    for one in found:
        assert told in one.output and ("tags.K.head" in one.output) == bool(told), one.output
        assert one.exit_code == (2 if kinds == "a" else 0)


def test_check_reads_targets_that_are_all_alike(run: Run, folder: Path) -> None:
    (folder / "alike.csv").write_text("smiles,same\n" + "".join(f"C{i},1.0\n" for i in range(90)))
    file = config(folder, "alike", data__path=str(folder / "alike.csv"), data__target="same")
    fails(run("check", file, "--rows"), "tags.W.head: the target is the same in all training rows")


def test_a_split_without_rows_is_not_scored(run: Run, folder: Path) -> None:
    file = config(folder, "no_test", data__split={"valid": 0.1, "test": 0})
    assert run("train", file).exit_code == 0
    fails(run("eval", "runs/no_test"), "its test split has no rows", "--split")
    assert run("eval", "runs/no_test", "--split", "valid").exit_code == 0
    report = run("report", "runs/no_test", "--out", "report_of_valid")
    assert report.exit_code == 0, report.output
    (section,) = json.loads((folder / "report_of_valid/report.json").read_text())["sections"]
    assert "valid" in json.dumps(section)


def test_results_of_another_split_stand_beside_those_of_test(run: Run, folder: Path) -> None:
    assert run("train", config(folder, "splits")).exit_code == 0
    assert run("eval", "runs/splits").exit_code == 0
    files = ["results.json", "held_out.csv", "held_out.safetensors"]
    before = [(folder / "runs/splits" / file).read_bytes() for file in files]
    assert run("eval", "runs/splits", "--split", "valid").exit_code == 0
    assert [(folder / "runs/splits" / file).read_bytes() for file in files] == before
    assert json.loads((folder / "runs/splits/valid/results.json").read_text())["split"] == "valid"
    assert all((folder / "runs/splits/valid" / file).is_file() for file in files)


def test_rows_that_were_trained_on_are_not_scored(run: Run, folder: Path) -> None:
    """Another share or another seed asks some of them; fewer held-out rows are still held-out rows."""
    file = config(folder, "seen", data__split={"test": 0.2, "valid": 0.2})
    assert run("train", file).exit_code == 0
    for override in ("data.sources.0.split.test=0.5", "data.sources.0.split.seed=1", "data.sources.0.split.by=[name]"):
        fails(
            run("eval", folder / "runs/seen", override),
            "<W> was trained on",
            "Set source.path and source.split as they were in training",
        )
    assert run("eval", folder / "runs/seen").exit_code == 0
    own = (folder / "runs/seen/results.json").read_bytes()
    told = run("eval", folder / "runs/seen", "data.sources.0.rows={test: 3}")
    assert told.exit_code == 0 and "Of other data than the run's (data.sources)" in told.stdout, told.output
    (scores,) = (folder / "runs/seen").glob("test-*")
    assert f"written to {scores}" in told.stdout
    assert json.loads((scores / "results.json").read_text())["rows"] == 3 and (scores / "held_out.csv").is_file()
    assert (folder / "runs/seen/results.json").read_bytes() == own
    shutil.copytree(folder / "backbone", folder / "moved")
    assert run("eval", folder / "runs/seen", f"backbone.model={folder / 'moved'}").exit_code == 0
    assert (folder / "runs/seen/results.json").read_bytes() != own, "the same rows, wherever the backbone lies"
    lines = (folder / "rows.csv").read_text().splitlines()
    (folder / "others.csv").write_text("\n".join([lines[0], *(f"O{line}" for line in lines[1:])]) + "\n")
    tags = {"W": {"load": "runs/seen/library"}, "D": {"kind": "domain", "length": 2}}
    over = {"tags": tags, "data__template": "a <D> {smiles} weighs <W>"}
    file = config(folder, "over_seen", **over, data__path=str(folder / "others.csv"))
    assert run("train", file).exit_code == 0
    other = [f"data.sources.0.path={folder / 'rows.csv'}", "data.sources.0.split.seed=1"]
    fails(run("eval", "runs/over_seen", *other), "<W> was trained on")  # though frozen


def test_rows_that_an_enriched_domain_tag_knows_are_not_held_out(run: Run, folder: Path) -> None:
    """It learned from their answers, as a function tag does; one that read the fields alone did not."""
    function = {"kind": "function", "length": 2, "head": {"type": "regression"}}
    other = {"data__template": "a <D> {smiles} weighs <W>", "data__split": {"seed": 1}}
    text = {"path": str(folder / "rows.csv"), "template": "so <D> {smiles}"}
    for name, has_target in (("enriched", True), ("alone", False)):
        tags: dict[str, Any] = {"D": {"kind": "domain", "length": 2}} | ({"W": function} if has_target else {})
        prompt = "a <D> {smiles} weighs <W>" if has_target else "a <D> {smiles}"
        target = ["weight"] if has_target else []
        both = {
            "sources": [
                text | {"split": {"by": ["smiles"]}},
                text | {"template": prompt, "target": target, "split": {"by": ["smiles"]}},
            ]
        }
        assert run("train", config(folder, name, tags=tags, data=both, loss={"span": 1.0})).exit_code == 0
        tags = {"D": {"load": f"runs/{name}/library"}, "W": function}
        told = run("train", config(folder, f"behind-{name}", tags=tags, **other))
        if has_target:
            fails(told, "<D> was trained on")
        else:
            assert told.exit_code == 0, told.output


def test_text_output_and_composition(run: Run, folder: Path) -> None:
    """A text task; then its function tag in a prompt it has never seen, with a tag of another library."""
    domain = config(folder, "domain", tags={"D": {"length": 2}}, data__template="<D> {smiles}", data__target=[])
    assert run("train", domain).exit_code == 0
    assert run("eval", "runs/domain", "--control", "runs/domain/last").exit_code == 0
    results = json.loads((folder / "runs/domain/results.json").read_text())
    controls = results["controls"]
    assert {"no tag", "untrained tag", "<D> of runs/domain/last"} == controls.keys()
    counts = {found["span_tokens"] for found in (results["metrics"], *controls.values())}
    assert len(counts) == 1, "without its tag a prompt predicts no first token, so none of them is scored on it"
    assert run("train", config(folder, "other")).exit_code == 0
    fails(
        run("eval", "runs/domain", "--control", "runs/other/library"), "--control", "no tag of the kind of <D> (domain)"
    )
    tags = {"Name": {"kind": "function", "length": 2}}
    file = config(
        folder,
        "text",
        tags=tags,
        data__template="{smiles} is called <Name> {output}",
        data__output="name",
        data__target=[],
    )
    assert run("train", file).exit_code == 0
    result = run("eval", "runs/text")
    assert result.exit_code == 0, result.stderr
    assert "no spBLEU" in result.stdout
    assert {"output_nats", "chrf++", "bleu"} <= json.loads((folder / "runs/text/results.json").read_text())[
        "metrics"
    ].keys()
    arguments = ["predict", "runs/text", folder / "rows.csv", folder / "named.tsv", "--max-new-tokens", 3]
    assert run(*arguments).exit_code == 0
    composed = [*arguments, "--library", "runs/domain/library", "--template", "A <D> {smiles} is <Name> {output}"]
    assert run(*composed).exit_code == 0
    assert len(list(csv.DictReader((folder / "named.tsv").open(), delimiter="\t"))) == 60


def test_enriching_and_several_sources(run: Run, folder: Path) -> None:
    """A loaded domain tag is learned on, beside a function tag that two sources share."""
    first = config(folder, "base", tags={"D": {"length": 2}}, data__template="A <D> {smiles}", data__target=[])
    assert run("train", first).exit_code == 0
    file = config(folder, "rich", tags={
        "D": {"load": "runs/base/library", "learn": True},
        "W": {"kind": "function", "length": 2, "head": {"reads": "both"}},
    }, loss={"span": 0.1, "value": 1.0})  # fmt: skip
    values = yaml.safe_load(file.read_text())
    source = {"path": str(folder / "rows.csv"), "target": "weight"}
    values["data"] = {"mix": "equal", "sources": [
        {**source, "template": "A <D> {smiles} weighs <W>"},
        {**source, "template": "{name} weighs <W>", "split": {"by": "smiles"}},
    ]}  # fmt: skip
    file.write_text(yaml.safe_dump(values))
    result = run("train", file)
    assert result.exit_code == 0, result.stderr
    assert "train/span_nats" in (folder / "runs/rich/metrics.jsonl").read_text()
    result = run("eval", "runs/rich")
    assert result.exit_code == 0, result.stderr
    results = json.loads((folder / "runs/rich/results.json").read_text())
    assert {"mse", "span_nats"} <= results["metrics"].keys()
    assert {"predict_mean", "ridge_both"} <= results["baselines"].keys()
    assert "ridge_fingerprints" not in results["baselines"], "the sources have no column in common"


def test_a_tag_of_a_backbone_with_other_weights_is_told(run: Run, folder: Path) -> None:
    first = config(folder, "packed", tags={"D": {"length": 2}}, data__template="A <D> {smiles}", data__target=[])
    assert run("train", first, "backbone.quantize=int8").exit_code == 0
    file = config(folder, "plain", tags={
        "D": {"load": "runs/packed/library"}, "W": {"kind": "function", "length": 2, "head": {"reads": "both"}},
    }, data__template="A <D> {smiles} weighs <W>")  # fmt: skip
    told = "<D> was trained with backbone.quantize=int8, and this config has none"
    for command in ("check", "train"):
        assert told in run(command, file).output
    assert told not in run("check", file, "backbone.quantize=int8").output


def test_sources_with_the_same_columns_are_one_table_to_baselines(run: Run, folder: Path) -> None:
    lines = (folder / "rows.csv").read_text().splitlines()
    for name, rows in (("one", lines[1::2]), ("other", lines[2::2])):
        (folder / f"{name}.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    file = config(folder, "halves", tags={"W": {"kind": "function", "length": 2, "head": {"reads": "both"}}})
    values = yaml.safe_load(file.read_text())
    values["data"] = {"mix": "equal", "sources": [
        {"path": str(folder / f"{name}.csv"), "target": "weight", "template": f"{text} {{smiles}} weighs <W>",
         "split": {"by": "smiles"}}
        for name, text in (("one", "A molecule"), ("other", "Another one,"))
    ]}  # fmt: skip
    file.write_text(yaml.safe_dump(values))
    assert run("train", file).exit_code == 0
    result = run("eval", "runs/halves")
    assert result.exit_code == 0, result.stderr
    results = json.loads((folder / "runs/halves/results.json").read_text())
    assert {"nearest_row", "ridge_fingerprints", "boosting_fingerprints"} <= results["baselines"].keys()
    assert results["baselines"]["ridge_fingerprints"]["r2"] > 0.5, "a weight is nearly a sum over what stands in it"


@pytest.mark.parametrize("mask", ["causal", "block"])
def test_groups_are_shared_and_remembered(run: Run, folder: Path, mask: str) -> None:
    """Causal: all up to the second field is shared; block: the span alone. The second epoch computes next to nothing,
    and the losses are those of the plain full backward."""
    base = config(folder, "sites", tags={"D": {"length": 2}}, data__template="A <D> {smiles}", data__target=[])
    assert run("train", base).exit_code == 0
    template = "The site <D> {name} {name} {name} {name} binds <D> {smiles} by <W>"
    tags = {"D": {"load": "runs/sites/library"}, "W": {"kind": "function", "length": 2, "head": {"reads": "both"}}}
    losses = {}
    for prefix in ("frozen", "full"):
        file = config(folder, f"{mask}-{prefix}", tags=tags, data__template=template, prefix=prefix, mask=mask, optim={
            "epochs": 2, "rows_per_step": 8, "rows_per_micro_batch": 8,
        })  # fmt: skip
        values = yaml.safe_load(file.read_text())
        values["data"]["sources"][0] |= {"group_by": "name", "rows_per_group": 4, "split": {"by": "smiles"}}
        file.write_text(yaml.safe_dump(values))
        bare = run("check", file, "data.sources[0].template=<D> {name} binds <D> {smiles} by <W>")
        assert ("begins with <D>" in bare.stdout) == (mask == "block"), bare.output
        assert "note" not in run("check", file).stdout, "there is text in front of each"
        result = run("train", file)
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in (folder / f"runs/{mask}-{prefix}/metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "train/loss" in line]
        losses[prefix] = [line["train/loss"] for line in steps]
        if prefix == "frozen":
            assert steps[0]["speed/prefix_sharing_ratio"] > (0.05 if mask == "block" else 0.4)
            assert steps[0]["speed/flops_ratio"] > 2 * steps[-1]["speed/flops_ratio"]
            assert steps[-1]["speed/prefix_hit_ratio"] > 0.3
    assert losses["frozen"] == pytest.approx(losses["full"], rel=2e-4)
    library = TagLibrary.load(folder / f"runs/{mask}-frozen/library")
    assert library.tags["W"].about["mask"] == mask
    assert library.tags["W"].about["dtype"] == "fp32", "and in its dtype, whatever is fastest just now"
    other = TagLibrary(library.backbone)
    for tag in library.tags.values():
        about = tag.about | {"mask": "causal"}
        other = other.add(Tag(tag.name, tag.kind, tag.rows_PD, tag.head, about))
    other.save(folder / f"causal-{mask}")
    answers = []
    for source in (f"runs/{mask}-frozen/library", f"causal-{mask}"):
        output = folder / f"{mask}-{Path(source).name}.csv"
        assert run("predict", source, "rows.csv", output).exit_code == 0
        answers.append([row["W"] for row in csv.DictReader(output.open())])
    assert (answers[0] == answers[1]) == (mask == "causal"), "predictions are made under the mask of training"


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


@pytest.mark.parametrize("cell", ["nan", "inf", "heavy", ""])
def test_bad_rows_are_named_or_skipped(run: Run, folder: Path, cell: str) -> None:
    rows = (folder / "rows.csv").read_text().splitlines()
    rows[7] = f"CCO,{cell},a,b"
    (folder / "bad.csv").write_text("\n".join(rows) + "\n")
    split = {"by": "smiles", "valid": 0.2, "test": 0.0}
    file = config(folder, "bad", data__path=str(folder / "bad.csv"), data__split=split)
    shutil.rmtree(folder / "runs/bad", ignore_errors=True)
    fails(run("train", file), "bad.csv, line 8", "weight is", "on_bad_row=skip")
    assert run("train", file, "data.on_bad_row=skip", "output=runs/bad_skip_" + cell).exit_code == 0
    listed = [json.loads(line) for line in (folder / f"runs/bad_skip_{cell}/bad_rows.jsonl").read_text().splitlines()]
    assert [(row["line"], Path(row["file"]).name) for row in listed] == [(8, "bad.csv")]


def test_libraries_that_do_not_fit(run: Run, folder: Path, tmp_path: Path) -> None:
    first = config(folder, "lib", tags={"D": {"length": 2}}, data__template="A <D> {smiles}", data__target=[])
    assert run("train", first).exit_code == 0
    library = TagLibrary.load(folder / "runs/lib/library")
    other = library.backbone._replace(fingerprint="0" * 64)
    TagLibrary(other, library.tags).save(tmp_path / "other")
    tags = {"D": {"load": str(tmp_path / "other")}, "W": {"kind": "function", "head": {}, "length": 2}}
    file = config(folder, "fit", tags=tags, data__template="A <D> {smiles} is <W>")
    fails(run("train", file), "000000000000", library.backbone.fingerprint[:12])
    shutil.copytree(folder / "runs/lib/library", tmp_path / "damaged")
    tensors = tmp_path / "damaged/tags.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    fails(run("train", file, f"tags.D.load={tmp_path / 'damaged'}"), "sha256")
    fails(run("train", file, f"tags.D.load={tmp_path}"), "not a tag library")


def test_a_folder_holds_one_run(run: Run, folder: Path, tmp_path: Path) -> None:
    file = config(folder, "one")
    assert run("train", file).exit_code == 0
    before = (folder / "runs/one/library/tags.safetensors").read_bytes()
    fails(run("train", file, "optim.tag_lr=0.5"), "already holds another run", "optim.tag_lr")
    again = run("train", file)
    assert again.exit_code == 0 and "finished before" in again.output and "give another output" in again.output
    assert (folder / "runs/one/library/tags.safetensors").read_bytes() == before
    shutil.rmtree(folder / "runs/one/library")
    assert run("train", file).exit_code == 0
    assert (folder / "runs/one/library/tags.safetensors").read_bytes() == before, "made anew from the last checkpoint"
    (tmp_path / "thesis.txt").write_text("mine")
    fails(run("train", file, f"output={tmp_path}"), "not empty")
    for name, is_taken in ((".git", True), (".tmp-config.yaml", False)):  # the second of a start that was cut off
        output = tmp_path / f"with {name}"
        output.mkdir()
        (output / name).write_text("")
        assert ("not empty" in run("train", file, f"output={output}").stderr) == is_taken
    fails(run("eval", tmp_path), "holds no run")
    fails(run("predict", tmp_path, folder / "rows.csv", folder / "p.csv"), "not a tag library")


def test_a_start_that_trains_nothing_changes_no_file(run: Run, folder: Path) -> None:
    """One of a finished run, and one that is refused: whoever reads the folder learns what trained it."""
    rows = folder / "mine.csv"
    shutil.copy(folder / "rows.csv", rows)
    file = config(folder, "kept", data__path=str(rows))
    assert run("train", file).exit_code == 0

    def files() -> dict[str, int]:
        paths = (path for path in (folder / "runs/kept").rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.stat().st_mtime_ns for path in paths}

    before = files()
    assert run("train", file).exit_code == 0
    assert files() == before
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-5]))
    fails(run("train", file), "a run goes on only with the same data")
    assert files() == before


def test_predict_refuses_what_would_harm(run: Run, folder: Path) -> None:
    assert run("train", config(folder, "harm")).exit_code == 0
    rows = folder / "rows.csv"
    fails(run("predict", "runs/harm", rows, rows), "never overwritten")
    fails(run("predict", "runs/harm", rows, folder / "x.xyz"), "xyz")
    (folder / "clash.csv").write_text("smiles,W\nC,1\n")
    fails(run("predict", "runs/harm", folder / "clash.csv", folder / "y.csv"), "already")
    (folder / "later.jsonl").write_text('{"smiles": "C"}\n{"smiles": "CC", "W": 1}\n')
    fails(run("predict", "runs/harm", folder / "later.jsonl", folder / "y.csv"), "later.jsonl", "'W' already")
    unusable, late = '{"smiles": ""}\n' * 10_000, '{"smiles": "CC", "W": 1}\n'  # so many objects tell the columns
    (folder / "later.jsonl").write_text(unusable + late)
    told = run("predict", "runs/harm", folder / "later.jsonl", folder / "y.csv")
    fails(told, "later.jsonl, line 10001", "'W' already")
    (folder / "other.csv").write_text("smile\nC\n")
    fails(run("predict", "runs/harm", folder / "other.csv", folder / "y.csv"), "Did you mean smile?")
    fails(run("predict", "runs/harm", rows, folder / "y.csv", "--tag", "V"), "no function tag")
    assert not (folder / "y.csv").exists()


def test_full_backward_and_no_validation_split(run: Run, folder: Path) -> None:
    """The reference path gives the same tags, and a run without validation rows ends in its last state."""
    split = {"by": "smiles", "valid": 0.0, "test": 0.2}
    tensors = []
    for prefix in ("frozen", "full"):
        file = config(folder, f"prefix_{prefix}", prefix=prefix, data__split=split)
        result = run("train", file)
        assert result.exit_code == 0, result.stderr
        library = TagLibrary.load(folder / f"runs/prefix_{prefix}/library")
        tensors.append(library.tags["W"].rows_PD)
    assert tiny.relative_error(tensors[0], tensors[1]) < 1e-4


def test_early_stop_keeps_the_best(run: Run, folder: Path) -> None:
    """By the loss with the head in closed form, unless the trained one is clearly better."""
    evaluation = {"every_steps": 1, "patience": 2}
    file = config(folder, "patience", evaluation=evaluation, optim__steps=60, optim__tag_lr=3.0, optim__head_lr=3.0)
    assert run("train", file, "optim.schedule=constant").exit_code == 0
    lines = [json.loads(line) for line in (folder / "runs/patience/metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "valid/loss" in line]
    losses = {line["step"]: line["valid/loss_refitted"] for line in scored}
    assert all(line["valid/loss_refitted"] in (line["valid/loss"], line["refit/W_after"]) for line in scored)
    assert len(losses) < 60
    best = min(losses, key=lambda step: losses[step])
    assert TagLibrary.load(folder / "runs/patience/library").tags["W"].about["best_step"] == best == max(losses) - 2


def test_fewer_rows_in_a_pass_are_no_other_run(run: Run, folder: Path) -> None:
    """Scored so where memory is short, it keeps what stands beside it."""
    assert run("train", config(folder, "passes")).exit_code == 0
    found = []
    for override in ([], ["evaluation.rows_per_batch=3"]):
        assert run("eval", "runs/passes", *override).exit_code == 0
        found.append(json.loads((folder / "runs/passes/results.json").read_text()))
    assert found[0]["config_digest"] == found[1]["config_digest"]
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-4)


def test_what_works_in_one_process_says_so_under_a_launcher(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (("sweep", config(folder, "ranks")), ("baseline", "runs/ranks")):
        fails(run(*command), f"{command[0]}: WORLD_SIZE is 2", "Start it without a launcher")
    assert not (folder / "runs/ranks").exists()


def test_tensorboard_has_what_the_jsonl_has(run: Run, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("train", config(folder, "board")).exit_code == 0
    events = EventAccumulator(str(folder / "runs/board/tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (folder / "runs/board/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert {
        "valid/loss", "train/gradient_norm", "train/tag_lr", "train/skipped_steps", "tags/W/gradient_norm",
        "tags/W/row_norm", "speed/rows_per_second", "speed/prefix_hit_ratio", "speed/live_tokens_per_second",
    } <= set(events.Tags()["scalars"])  # fmt: skip
