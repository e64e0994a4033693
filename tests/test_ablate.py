"""Tags taken out, reordered and swapped: each is scored on the same rows, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tagllm.evaluate.ablate import changes_of
from tagllm.tags import Tag, TagLibrary
from tests.commands import Run, config

TAGS = {"D": {"length": 3}, "E": {"length": 2}, "W": {"kind": "function", "length": 2, "head": {"refit": False}}}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_a_change_keeps_rows_or_takes_them_all(lengths: list[int]) -> None:
    tags = {f"T{at}": Tag(f"T{at}", "domain", torch.randn(n, 4)) for at, n in enumerate(lengths)}
    changes = changes_of(tags)
    for what, changed in changes.items():
        ((name, tag),) = changed.items()
        before_PD = tags[name].rows_PD
        if what.startswith("without"):
            assert len(tag.rows_PD) == 0
        elif "in the place of" in what:
            other = what.split(">")[0].lstrip("<")
            assert tag.rows_PD.equal(tags[other].rows_PD) and other != name
        else:
            assert sorted(tag.rows_PD.tolist()) == sorted(before_PD.tolist()) and not tag.rows_PD.equal(before_PD)
    named = {name for changed in changes.values() for name in changed}
    assert named == {name for name, tag in tags.items() if len(tag.rows_PD)}


def test_eval_scores_each_of_them(run: Run, folder: Path) -> None:
    file = config(folder, "ablated", tags=TAGS, data__template="<D> {smiles} of kind <E> {kind} weighs <W>")
    assert run("train", file, "optim.tag_lr=0.5", "optim.head_lr=0.1", "optim.steps=6").exit_code == 0
    out = folder / "runs/ablated"
    before = TagLibrary.load(out / "library").tags["D"].rows_PD
    result = run("eval", out, "--ablate")
    assert result.exit_code == 0, result.stderr
    results = json.loads((out / "results.json").read_text())
    found = {name: metrics["mse"] for name, metrics in results["ablations"].items()}
    assert found.pop("as learned") == pytest.approx(results["metrics"]["mse"], rel=1e-5)
    assert set(found) == {
        "without <D>", "<D> reversed", "<D> shuffled", "without <E>", "<E> reversed", "without <W>", "<W> reversed",
        "<E> in the place of <D>", "<D> in the place of <E>",
    }  # fmt: skip
    assert all(mse != pytest.approx(results["metrics"]["mse"], rel=1e-6) for mse in found.values())
    assert TagLibrary.load(out / "library").tags["D"].rows_PD.equal(before), "the library stays as it is"
    assert "without <D>" in result.stdout


def test_without_being_asked_nothing_is_ablated(run: Run, folder: Path) -> None:
    assert run("train", config(folder, "plain")).exit_code == 0
    assert run("eval", folder / "runs/plain").exit_code == 0
    assert "ablations" not in json.loads((folder / "runs/plain/results.json").read_text())


def test_a_domain_tag_counts_nats(run: Run, folder: Path) -> None:
    file = config(folder, "nats", tags={"D": {"length": 2}}, data__template="<D> {smiles}", data__target=[])
    assert run("train", file, "optim.steps=4", "optim.tag_lr=0.1").exit_code == 0
    assert run("eval", folder / "runs/nats", "--ablate").exit_code == 0
    results = json.loads((folder / "runs/nats/results.json").read_text())
    assert results["ablations"]["without <D>"]["span_nats"] == results["controls"]["no tag"]["span_nats"]
    assert set(results["ablations"]) == {"as learned", "without <D>", "<D> reversed"}


def test_a_control_takes_the_place_of_all_learned_tags_of_its_kind(run: Run, folder: Path) -> None:
    """Not of the first alone, beside which the others would still say what they have learned."""
    other = config(folder, "other", tags={"C": {"length": 2}}, data__template="<C> {smiles}", data__target=[])
    assert run("train", other).exit_code == 0
    both = config(folder, "both", tags={"A": {"length": 2}, "B": {"length": 2}})
    values = yaml.safe_load(both.read_text())
    source = {"path": str(folder / "rows.csv"), "split": {"by": "smiles"}}
    values["data"]["sources"] = [source | {"template": f"<{t}> {{{f}}}"} for t, f in (("A", "smiles"), ("B", "name"))]
    both.write_text(yaml.safe_dump(values))
    assert run("train", both).exit_code == 0
    assert run("eval", "runs/both", "--control", "runs/other/library").exit_code == 0
    found = json.loads((folder / "runs/both/results.json").read_text())["controls"]["<C>"]
    rows_PD = TagLibrary.load(folder / "runs/other/library").tags["C"].rows_PD
    library = TagLibrary.load(folder / "runs/both/library")
    for name in ("A", "B"):
        library = library.add(library.tags[name].with_rows(rows_PD))
    library.save(folder / "runs/both/library")
    assert run("eval", "runs/both").exit_code == 0
    metrics = json.loads((folder / "runs/both/results.json").read_text())["metrics"]
    assert found["span_nats"] == pytest.approx(metrics["span_nats"], rel=1e-5)
