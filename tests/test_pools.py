"""Means taken apart: the fields behind each domain tag by themselves, in whatever way a row is computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tagllm.config import Pool
from tagllm.config_file import load_config
from tagllm.errors import UserError
from tagllm.stage import stage_of_run
from tagllm.tags import TagLibrary
from tagllm.template import all_pools, parse_template, pools_of
from tests import tiny
from tests.commands import Run, config, fails

KINDS = {"SMILES": "domain", "Protein": "domain", "F": "function"}


@pytest.mark.parametrize(
    ("pool", "template", "pools", "owners"),
    [
        ("apart", "The drugs <SMILES> {a} and <SMILES> {b} on {cell} <F>", {"a": 1, "b": 1, "cell": 2}, (0, 1)),
        ("apart", "<Protein> {p} <SMILES> {s} <F>", {"p": 1, "s": 2}, (0, 1)),
        ("apart", "{a} and {b} and {a} again <F>", {"a": 1, "b": 2}, (0, 1)),
        ("apart", "<SMILES> {s} <F> {output}", {"s": 1, "output": 0}, (0,)),
        ("each", "{cell} <SMILES> {a} and <SMILES> {b} <F>", {"cell": 1, "a": 2, "b": 3}, (0, 1, 1)),
        ("each", "<SMILES> {a} {cell} <SMILES> {b}, <SMILES> {a} <F>", {"a": 1, "cell": 2, "b": 3}, (0, 1, 0)),
        ("each", "{a} and {b} <F> {output}", {"a": 1, "b": 2, "output": 0}, (0, 1)),
        ("together", "{cell} <SMILES> {a} and <SMILES> {b} <F>", {"cell": 1, "a": 1, "b": 1}, (0,)),
    ],
)
def test_which_mean_a_field_goes_into(
    pool: Pool, template: str, pools: dict[str, int], owners: tuple[int, ...]
) -> None:
    parsed = parse_template(template, KINDS)
    found = {part.value: at for part, at in zip(parsed.parts, pools_of(parsed, KINDS, pool), strict=True) if at}
    assert found == {name: at for name, at in pools.items() if at}
    assert all_pools([parsed, parse_template("{a} <F>", KINDS)], KINDS, pool) == owners


@pytest.mark.parametrize(
    "settings", [{}, {"frozen": False}, {"block": True}, {"block": True, "free_spans": True}], ids=str
)
@pytest.mark.parametrize("remember", [0, 1 << 24])
def test_means_apart_are_the_mean_together_taken_apart(settings: dict[str, Any], remember: int) -> None:
    """The first mean is that of a prompt that ends behind the first field; with both of them, it is the whole."""
    apart, together = tiny.layout(num_pools=2), tiny.layout()
    random = np.random.default_rng(0)
    first: tuple[str | int, ...] = (4, "Frozen", "~5#1")
    second: tuple[str | int, ...] = ("Frozen", "~8#2")

    def means(of: Any, pieces: tuple[str | int, ...]) -> torch.Tensor:
        model = tiny.model(of, remember=remember)
        rows = [tiny.example(of, (*pieces, 3, "F"), random) for _ in range(2)]
        collate = tiny.collator(of, **settings)
        batches = [collate(rows[:1]), collate(rows)]  # what is remembered of the first serves the second
        return [model(batch).mean_BD.detach() for batch in batches][1][0]

    found_GD = means(apart, (*first, *second)).view(2, -1)
    torch.testing.assert_close(found_GD[0], means(together, first), rtol=1e-4, atol=1e-5)
    whole_D = (5 * found_GD[0] + 8 * found_GD[1]) / 13
    torch.testing.assert_close(whole_D, means(together, (*first, *second)), rtol=1e-4, atol=1e-5)


HEAD = {"type": "regression", "reads": "both", "pool": "apart", "kernel": "anova"}


@pytest.fixture
def finished(folder: Path, run: Run) -> Path:
    tags = {"SMILES": {"length": 2}, "W": {"kind": "function", "length": 2, "head": HEAD}}
    made = config(folder, "pools", tags=tags, data__template="{name} is <SMILES> {smiles} <W>")
    trained = run("train", made)
    assert trained.exit_code == 0, trained.output
    return folder / "runs" / "pools"


def test_a_run_reads_them_apart_from_end_to_end(finished: Path, folder: Path, run: Run) -> None:
    head = TagLibrary.load(finished / "library").tags["W"].head
    assert head is not None and head.pools == (0, 1)
    assert head.weight_KF.shape[1] == 3 * tiny.HIDDEN
    for command in (("eval", finished), ("predict", finished, folder / "rows.csv", folder / "pools.csv")):
        done = run(*command)
        assert done.exit_code == 0, done.output
    results = json.loads((finished / "results.json").read_text())
    assert {"kernel_last", "kernel_mean", "kernel_both"} <= set(results["baselines"])
    baseline = run("baseline", finished, "--method", "lora", "--lr", "1e-3", "--budget-s", "0.5")
    assert baseline.exit_code == 0, baseline.output


def test_a_run_reads_each_field_by_itself_from_end_to_end(folder: Path, run: Run) -> None:
    spec = HEAD | {"pool": "each", "symmetric": True}
    tags = {"SMILES": {"length": 2}, "W": {"kind": "function", "length": 2, "head": spec}}
    template = "{kind} <SMILES> {smiles} <SMILES> {name} <W>"
    trained = run("train", config(folder, "each", tags=tags, data__template=template))
    assert trained.exit_code == 0, trained.output
    head = TagLibrary.load(folder / "runs/each/library").tags["W"].head
    assert head is not None and head.pools == (0, 1, 1) and head.weight_KF.shape[1] == 4 * tiny.HIDDEN
    for command in (
        ("eval", folder / "runs/each"),
        ("predict", folder / "runs/each", folder / "rows.csv", folder / "each.csv"),
        ("baseline", folder / "runs/each", "--method", "prompt_tuning", "--lr", "1e-3", "--budget-s", "0.5"),
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output
    results = json.loads((folder / "runs/each/results.json").read_text())
    assert {"ridge_mean", "kernel_last", "kernel_mean", "kernel_both"} <= set(results["baselines"])


def test_a_kernel_of_fields_that_trade_places_needs_each_by_itself(folder: Path, run: Run) -> None:
    tags = {"W": {"kind": "function", "length": 2, "head": HEAD | {"symmetric": True}}}
    fails(run("train", config(folder, "not-each", tags=tags)), "symmetric is true", "pool is apart", "pool: each")


def test_too_many_fields_that_trade_places_are_told_before_anything_is_read(folder: Path, run: Run) -> None:
    spec = HEAD | {"pool": "each", "symmetric": True}
    tags = {"S": {"length": 2}, "W": {"kind": "function", "length": 2, "head": spec}}
    template = " ".join(f"<S> {{{column}}}" for column in ("smiles", "name", "kind", "wait", "same")) + " <W>"
    file = config(folder, "five", tags=tags, data__template=template, data__path="nowhere.csv")
    fails(run("check", file), "tags.W.head.symmetric", "5 fields", "120 orders", "pool: apart")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("drug <S> {smiles}\ndrug <S> {name}. <W>", ["'drug'", "'\\ndrug'"]),
        ("drug <S> {smiles} <S> {name} <W>", ["'drug' and ''"]),
        ("drug <S> {smiles} and <S> {name} <W>", ["'drug' and ' and'"]),
        ("{kind} drug <S> {smiles} drug <S> {name} <W>", []),
    ],
)
@pytest.mark.parametrize("mask", ["block", "causal"])
def test_fields_that_trade_places_behind_other_words_are_noted(
    folder: Path, run: Run, mask: str, template: str, words: list[str]
) -> None:
    spec = HEAD | {"pool": "each", "symmetric": True}
    tags = {"S": {"length": 2}, "W": {"kind": "function", "length": 2, "head": spec}}
    checked = run("check", config(folder, "words", tags=tags, data__template=template, mask=mask))
    assert checked.exit_code == 0, checked.output
    assert ("interchangeable" in checked.stdout) == (mask == "block" and bool(words)), checked.output
    assert all(word in " ".join(checked.stdout.split()) for word in words if mask == "block"), checked.output


def test_a_prompt_with_other_pools_is_refused(finished: Path, folder: Path, run: Run) -> None:
    asked = ["predict", finished, folder / "rows.csv", folder / "none.csv", "--template"]
    fails(run(*asked, "<SMILES> {smiles} <W>"), "template: its fields are of <SMILES>", "in the same order")
    more = "{name} <SMILES> {smiles} {kind} <W>"
    fails(run(*asked, more), "tags.W.head", "reads 2 means over fields side by side", "have 3")


NAME, SMILES = "<Name> {name}", "<SMILES> {smiles}"
EACH = {"pool": "each"}


def two_domains(folder: Path, name: str, *templates: str, pool: str = "apart", **head: object) -> Path:
    tags = {
        "Name": {"length": 2},
        "SMILES": {"length": 2},
        "W": {"kind": "function", "length": 2, "head": {"reads": "mean", "pool": pool, **head}},
    }
    file = config(folder, name, tags=tags)
    values = yaml.safe_load(file.read_text())
    (source,) = values["data"]["sources"]
    values["data"]["sources"] = [
        {**source, "template": template, "split": {"by": ["smiles"]}} for template in templates
    ]
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("pool", ["apart", "each"])
@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (f"{NAME} {SMILES} <W>", f"{SMILES} {NAME} <W>", ["of <SMILES>, <Name>,", "of <Name>, <SMILES>;"]),
        (f"{NAME} {SMILES} <W>", f"{SMILES} <W>", ["of <SMILES>,", "of <Name>, <SMILES>;"]),
        (
            "{name} <SMILES> {smiles} <Name> <W>",
            f"{SMILES} {{kind}} <W>",
            ["of <SMILES>, {kind},", "{name}, <SMILES>;"],
        ),
        ("{name} {kind} <W>", f"{NAME} {SMILES} {{kind}} {{name}} <W>", ["of {name}, {kind},", "{kind}, {name};"]),
    ],
)
def test_sources_in_opposite_orders_are_told_before_anything_is_read(
    folder: Path, run: Run, pool: str, one: str, other: str, told: list[str]
) -> None:
    """Their means would trade places without a word."""
    lines = fails(run("check", two_domains(folder, "orders", one, other, pool=pool)), *told, f"has pool: {pool}")
    assert len(lines) == 1 and "data.sources.0.template" in lines[0] and "data.sources.1.template" in lines[0]


@pytest.mark.parametrize(
    ("one", "other", "head"),
    [
        (f"{NAME} {SMILES} <W>", f"{SMILES} {NAME} <W>", {"pool": "together"}),
        (f"{NAME} {SMILES} <W>", f"{SMILES} {NAME} <W>", {"reads": "last"}),
        (f"{NAME} {SMILES} <W>", f"{NAME} <W>", {}),
        (f"{NAME} <W>", f"{SMILES} <W>", {}),
        (f"{NAME} <SMILES> {{smiles}} <W>", "<Name> {kind}, really, <SMILES> {name} <W>", {}),
        (
            "<Name> {kind} <SMILES> {smiles} {name} <W>",
            "<Name> {smiles} <SMILES> {kind} {name} <W>",
            {"pool": "each"},
        ),
    ],
)
def test_sources_in_one_order_are_not(folder: Path, run: Run, one: str, other: str, head: dict[str, Any]) -> None:
    checked = run("check", two_domains(folder, "one-order", one, other, **head))
    assert checked.exit_code == 0, checked.output


def test_a_loaded_head_is_asked_in_the_order_of_its_training(folder: Path, run: Run) -> None:
    trained = run("train", two_domains(folder, "first", f"{NAME} {SMILES} <W>"))
    assert trained.exit_code == 0, trained.output
    library = TagLibrary.load(folder / "runs/first/library")
    for number, template in enumerate((f"{NAME} then {SMILES} <W>", f"{SMILES} {NAME} <W>")):
        tags = {name: {"load": "runs/first/library", "learn": name == "SMILES"} for name in library.tags}
        checked = run("check", config(folder, f"second-{number}", tags=tags, data__template=template))
        if number == 0:
            assert checked.exit_code == 0, checked.output
            continue
        fails(
            checked, "its fields are of <SMILES>, <Name>, those of the prompt <W> was trained with of <Name>, <SMILES>"
        )
        with pytest.raises(UserError, match="the prompt <W> was trained with of <Name>, <SMILES>"):
            stage_of_run(load_config(folder / "second-1.yaml"), library, "here")
    bare = replace(library, tags={name: replace(tag, about={}) for name, tag in library.tags.items()})
    stage_of_run(load_config(folder / "second-1.yaml"), bare, "here")  # one that does not know is taken as it is


def test_predict_asks_in_the_order_of_training(folder: Path, run: Run) -> None:
    assert run("train", two_domains(folder, "asked", f"{NAME} {SMILES} <W>")).exit_code == 0
    ask = ("predict", "runs/asked", folder / "rows.csv", folder / "asked.csv", "--template")
    assert run(*ask, f"{NAME} of {SMILES} weighs <W>").exit_code == 0
    fails(run(*ask, f"{SMILES} {NAME} <W>"), "template: its fields are of <SMILES>, <Name>", "the same order")
