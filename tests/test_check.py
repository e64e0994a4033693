"""`tagllm check`: what it tells of a config before anything is trained."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.commands import Run, config, fails


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


def test_a_rank_that_is_to_use_the_cpu_sees_no_gpu(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run("check", config(folder)).exit_code == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("template", "noted"),
    [
        ("<W> of {smiles}", "no field stands before <W>"), ("{smiles} <W>", ""), ("{smiles} <W> as said", ""),
        ("{smiles} <W> {kind}", "{kind} stands behind <W>"), ("{smiles} <W> {kind} {output}", ""),
    ],
)  # fmt: skip
def test_fields_that_no_answer_depends_on_are_noted(run: Run, folder: Path, template: str, noted: str) -> None:
    answer = {"data__output": "name"} if "{output}" in template else {}
    told = run("check", config(folder, data__template=template, **answer))
    assert told.exit_code == 0, told.output
    assert (" note:" in told.output) == bool(noted) and noted in told.output


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


def test_more_tokens_than_the_backbone_takes(run: Run, folder: Path) -> None:
    file = config(folder, "long", data__max_tokens=100_000)
    for command in (["check", file, "--rows"], ["plan", file], ["train", file]):
        fails(run(*command), "data.max_tokens is 100000; the backbone takes at most")


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
