"""`tagllm eval`: of which rows there are scores, and what stands beside them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import Run, config, fails


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


def test_fewer_rows_in_a_pass_are_no_other_run(run: Run, folder: Path) -> None:
    """Scored so where memory is short, it keeps what stands beside it."""
    assert run("train", config(folder, "passes")).exit_code == 0
    found = []
    for override in ([], ["evaluation.rows_per_batch=3"]):
        assert run("eval", "runs/passes", *override).exit_code == 0
        found.append(json.loads((folder / "runs/passes/results.json").read_text()))
    assert found[0]["config_digest"] == found[1]["config_digest"]
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-4)
