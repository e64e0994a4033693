"""Prompts over libraries of tags, scored on the same rows: tags, controls, worked examples, heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tagllm.compose import Composer, _require_alike
from tagllm.compose_config import ComposeConfig
from tagllm.config import DataConfig, SplitConfig
from tagllm.config_file import load_as
from tagllm.data.dataset import Prompts, tokenise
from tagllm.errors import UserError
from tagllm.evaluate import kept
from tagllm.evaluate.answers import chosen, training_means
from tagllm.evaluate.generate import generate
from tagllm.ranks import Ranks
from tagllm.tags import TagLibrary
from tests.commands import Run, config, fails

W = {"kind": "function", "length": 2, "head": {"type": "regression"}}


@pytest.fixture
def libraries(folder: Path, run: Run) -> list[str]:
    """<FR> and <T>, which writes names, and <W>, which answers with a number."""
    tags = {"FR": {"length": 2}, "T": {"kind": "function", "length": 2}}
    text = config(folder, "text", tags=tags, data__template="{smiles} <T> <FR> {output}", data__target=[])
    number = config(folder, "number", tags={"W": W, "SMILES": {"length": 2}}, data__template="<SMILES> {smiles} <W>")
    if not (folder / "runs/number/library").is_dir():
        assert run("train", text, "data.sources[0].output=name").exit_code == 0
        assert run("train", number).exit_code == 0
    return [str(folder / "runs/text/library"), str(folder / "runs/number/library")]


def composed(folder: Path, libraries: list[str], prompts: dict[str, Any], name: str = "case", **case: Any) -> Path:
    source = {"path": str(folder / "rows.csv"), "output": "name", "target": "weight"}
    values = {
        "output": str(folder / "composed"), "backbone": {"model": str(folder / "backbone"), "dtype": "fp32"},
        "libraries": libraries, "evaluation": {"generated_rows": 3, "max_new_tokens": 4},
        "cases": {name: {"source": source, "prompts": prompts, **case}},
    }  # fmt: skip
    file = folder / "compose.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def opened(config: Path, overrides: Sequence[str] = ()) -> Composer:
    return Composer.open(load_as(ComposeConfig, config, overrides), Ranks(0, 1, torch.device("cpu")))


def results_of(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    of = folder / "composed" / name
    lines = (of / "generated.jsonl").read_text().splitlines()
    return json.loads((of / "results.json").read_text()), [json.loads(line) for line in lines]


def test_controls_are_asked_of_the_same_rows(folder: Path, run: Run, libraries: list[str]) -> None:
    prompts = {
        "tags": "{smiles} <T> <FR> {output}", "no tags": "{smiles}\nName: {output}", "copy": {"copies": "smiles"},
        "examples": {"template": "{smiles} <T> {output}", "shots": 2},
    }  # fmt: skip
    told = run("compose", composed(folder, libraries, prompts, "same", language="fr"))
    assert told.exit_code == 0, told.output
    results, answers = results_of(folder, "same")
    assert results["prompt"] == "tags" and set(results["controls"]) == {"no tags", "copy", "examples"}
    assert {"bleu", "chrf++", "exact", "in_language"} <= set(results["metrics"]) and "no spBLEU" in results["note"]
    assert set(results["libraries"]) == set(libraries)
    assert all({"sha256", "command", "commit"} <= set(one) for one in results["libraries"].values())
    asked = {name: [line["reference"] for line in answers if line["source"] == name] for name in prompts}
    assert len(asked["tags"]) == 3 and all(references == asked["tags"] for references in asked.values())
    assert all(line["generated"] == line["prompt"] for line in answers if line["source"] == "copy")
    given = {name: [line["given"] for line in answers if line["source"] == name] for name in prompts}
    assert all(fields == given["copy"] for fields in given.values()), "what is asked about, without words and examples"
    worked = next(line["prompt"] for line in answers if line["source"] == "examples")
    assert worked.count("\n\n") == 2 and "x" in worked.split("\n\n")[0]


def test_prompts_without_tags_are_asked_once_for_all_libraries(
    folder: Path, libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(kept, "generate", lambda *args: asked.append(int(args[2][0].max())) or generate(*args))
    prompts = {
        "tags": "{smiles} <T> <FR> {output}", "no tags": "{smiles} is called {output}",
        "examples": {"template": "{smiles}: {output}", "shots": 2},
    }  # fmt: skip

    def answers(output: str, **evaluation: int) -> list[dict[str, str]]:
        asked.clear()
        settings = [f"evaluation.{key}={value}" for key, value in evaluation.items()]
        opened(composed(folder, libraries, prompts), [f"output={folder / output}", *settings]).score("case")
        lines = (folder / output / "case/generated.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    first = answers("asked_first")
    assert len(asked) == 3
    assert answers("asked_again") == first and len(asked) == 1 and asked[0] >= 96, "the prompt with tags alone"
    answers("asked_for_more", max_new_tokens=6)
    assert len(asked) == 3, "other settings may give other answers"


def test_rows_to_score_are_those_that_a_run_over_these_columns_holds_out(folder: Path, libraries: list[str]) -> None:
    """In whatever order a prompt has them."""
    composer = opened(composed(folder, libraries, {"tags": "{smiles} {kind} <W>"}))
    held_out = {
        text: composer._built("case", text, "test").examples("test")[0].row_numbers()
        for text in ("{smiles} {kind} <W>", "{kind} of {smiles} <W>")
    }
    stage = composer._built("case", "{smiles} {kind} <W>", "test").stage
    by_default = stage.config.data.sources[0].model_copy(update={"split": SplitConfig()})
    prompts = Prompts(stage.layout(96), composer.backbone.tokenizer, composer.backbone.max_tokens)
    data = tokenise(DataConfig(sources=[by_default]), stage.templates, prompts, folder / "cache", ["test"])
    assert [data.splits["test"][0].row_numbers()] * 2 == list(held_out.values())


def test_where_there_are_no_training_rows_examples_are_of_validation(folder: Path, libraries: list[str]) -> None:
    """As FLORES is given: two splits, and none to train on."""
    lines = (folder / "rows.csv").read_text().splitlines()
    (folder / "dev.csv").write_text("\n".join(lines[:11]) + "\n")
    (folder / "devtest.csv").write_text("\n".join([lines[0], *lines[11:31]]) + "\n")
    path = {"valid": str(folder / "dev.csv"), "test": str(folder / "devtest.csv")}
    source = {"path": path, "output": "name", "split": {"by": ["smiles"]}}
    prompts = {"tags": "{smiles} <T> <FR> {output}", "shown": {"template": "{smiles}: {output}", "shots": 2}}
    composer = opened(composed(folder, libraries, prompts, source=source))
    examples = {line.split(",")[0] for line in lines[1:11]}
    assert {
        shown.split(":")[0] for shown in composer._worked("case", "{smiles}: {output}", 2).split("\n\n")[:2]
    } <= examples
    assert composer.score("case")["controls"]["shown"]


def test_worked_examples_are_training_rows_as_they_stand_in_the_prompt(folder: Path, libraries: list[str]) -> None:
    file = composed(folder, libraries, {"tags": {"template": "a {smiles} <T> <FR> {output}", "shots": 2}})
    composer = opened(file)
    worked = composer._worked("case", "\\{ {smiles} <T> <FR> {output}", 2)
    first, second, rest = worked.split("\n\n")
    assert not rest and first != second
    train = composer._built("case", "{smiles} <T> <FR> {output}", "train").examples("train")[0]
    some = chosen(train, 2)
    assert some != [0, 1], "data may be sorted: the first rows would be of a kind"
    rows = train.columns(["smiles", "name"], some)
    assert first == f"\\{{ {rows['smiles'][0]}<T><FR> {rows['name'][0]}"


def test_a_head_answers_in_other_prompts_than_it_was_trained_in(folder: Path, run: Run, libraries: list[str]) -> None:
    prompts = {"tags": "<SMILES> {smiles} <W>", "other domain": "<FR> {smiles} <W>", "no domain": "{smiles} <W>"}
    assert run("compose", composed(folder, libraries, prompts, "heads")).exit_code == 0
    results, answers = results_of(folder, "heads")
    assert not answers and results["learned"] == ["W"]
    tags = folder / "runs/number"
    assert run("eval", tags).exit_code == 0
    of_eval = json.loads((tags / "results.json").read_text())["metrics"]["mse"]
    assert results["metrics"]["mse"] == pytest.approx(of_eval, rel=1e-4)  # summed in another order
    found = {name: metrics["mse"] for name, metrics in results["controls"].items()}
    assert len({results["metrics"]["mse"], *found.values()}) == 3


def test_a_head_beside_numbers_that_the_model_writes(folder: Path, run: Run, libraries: list[str]) -> None:
    """In-context prompting: digits of worked examples, on the rows that the head answers."""
    prompts = {"tags": "<SMILES> {smiles} <W>", "in text": {"template": "{smiles} weighs {output}", "shots": 2}}
    file = composed(folder, libraries, prompts, "digits")
    assert run("compose", file, "cases.digits.source.output=weight", "evaluation.generated_rows=60").exit_code == 0
    results, answers = results_of(folder, "digits")
    assert {"mse", "mae"} <= set(results["controls"]["in text"]) and len(answers) == results["rows"]
    fails(run("compose", file, "cases.digits.source.output=weight"), "different numbers of rows (tags ", "in text 3)")


def test_what_was_scored_is_not_scored_again(folder: Path, run: Run, libraries: list[str]) -> None:
    file = composed(folder, libraries, {"tags": "{smiles} <T> <FR> {output}"}, "once")
    assert run("compose", file).exit_code == 0
    then = results_of(folder, "once")[0]
    assert run("compose", file).exit_code == 0
    assert results_of(folder, "once")[0] == then
    assert run("compose", file, "evaluation.max_new_tokens=3").exit_code == 0
    assert results_of(folder, "once")[0]["config_digest"] != then["config_digest"]


@pytest.mark.parametrize("language", ["FR", "klingon"])
def test_a_language_that_cannot_be_told_is_refused_before_anything_is_generated(
    folder: Path, run: Run, libraries: list[str], language: str
) -> None:
    file = composed(folder, libraries, {"tags": "{smiles} <T> <FR> {output}"}, language=language)
    fails(run("compose", file), f"cases.case.language is '{language}'", "code of a language")


def test_a_head_of_classes_is_scored_as_one(folder: Path, run: Run) -> None:
    head = {"type": "classification", "classes": ["a", "b"]}
    file = config(
        folder, "composed_classes", tags={"K": W | {"head": head}}, data__template="{smiles} <K>", data__target=["kind"]
    )
    assert run("train", file).exit_code == 0
    library = str(folder / "runs/composed_classes/library")
    case = composed(folder, [library], {"tags": "{smiles} <K>"}, "classes")
    assert run("compose", case, "cases.classes.source.target=kind").exit_code == 0
    assert {"accuracy", "auroc"} <= set(results_of(folder, "classes")[0]["metrics"])


def test_a_head_is_asked_under_the_mask_it_was_trained_under(folder: Path, run: Run) -> None:
    prompt, mse = "Of {kind} the drug is <S> {smiles} weighs <W>", {}
    for mask in ("block", "causal"):
        tags = {"S": {"length": 2}, "W": W | {"head": {"reads": "both"}}}
        file = config(folder, f"composed_{mask}", tags=tags, mask=mask, data__template=prompt)
        assert run("train", file).exit_code == 0
        assert run("eval", f"runs/composed_{mask}").exit_code == 0
        of_eval = json.loads((folder / f"runs/composed_{mask}/results.json").read_text())["metrics"]["mse"]
        case = composed(folder, [str(folder / f"runs/composed_{mask}/library")], {"tags": prompt}, mask)
        assert run("compose", case).exit_code == 0
        mse[mask] = results_of(folder, mask)[0]["metrics"]["mse"]
        assert mse[mask] == pytest.approx(of_eval, rel=1e-4)
    assert mse["block"] != pytest.approx(mse["causal"], rel=1e-3)


@pytest.mark.parametrize("target", ["[]", "[weight,weight]"])
def test_a_head_needs_its_columns(folder: Path, run: Run, libraries: list[str], target: str) -> None:
    file = composed(folder, libraries, {"tags": "{smiles} <W>"})
    fails(run("compose", file, f"cases.case.source.target={target}"), "source.target names", "the head of <W> needs 1")


def test_rows_that_changed_are_scored_anew(folder: Path, run: Run, libraries: list[str]) -> None:
    table = folder / "changing.csv"
    file, digests = composed(folder, libraries, {"tags": "{smiles} <W>"}, "changed"), []
    for add in ("", "0"):
        table.write_text("smiles,weight\n" + "".join(f"C{i},{i}{add}\n" for i in range(60)))
        assert run("compose", file, f"cases.changed.source.path={table}").exit_code == 0
        digests.append(results_of(folder, "changed")[0]["config_digest"])
    assert digests[0] != digests[1]


def test_a_tag_that_was_trained_anew_is_scored_anew(folder: Path, run: Run, libraries: list[str]) -> None:
    file = composed(folder, libraries, {"tags": "{smiles} <T> <FR> {output}"}, "anew")
    assert run("compose", file).exit_code == 0
    then = results_of(folder, "anew")[0]
    library = TagLibrary.load(Path(libraries[0]))
    tag = library.tags["T"]
    library.add(tag.with_rows(tag.rows_PD + 1)).save(Path(libraries[0]))
    assert run("compose", file).exit_code == 0
    assert results_of(folder, "anew")[0]["config_digest"] != then["config_digest"]


def test_prompts_that_would_ask_something_else_are_refused(folder: Path, libraries: list[str]) -> None:
    composer = opened(composed(folder, libraries, {"tags": "{smiles} <T> <FR> {output}"}))
    asked = composer._prompt("case", "tags")
    alike = {"tags": asked, "in text": asked}
    _require_alike(alike, "cases.case", 3)
    for change, words in (
        ({"rows": asked.rows[1:]}, "different numbers of rows .tags 3, in text 2.*generated_rows .it is 3"),
        ({"rows": [row + 1 for row in asked.rows]}, "in text leaves no room for some rows that tags has"),
        ({"cut": 2}, "fields do not fit into in text in 2 rows, into tags in 0.*fewer shots"),
    ):
        with pytest.raises(UserError, match=words):
            _require_alike(alike | {"in text": asked._replace(**change)}, "cases.case", 3)


def test_answers_that_are_no_numbers_count_as_the_mean_of_training_rows(folder: Path, libraries: list[str]) -> None:
    """Not as 0, which weighs as much as the mean does."""
    file = composed(folder, libraries, {"in text": "{smiles} weighs {output}"})
    composer = opened(file, ["cases.case.source.output=weight"])
    built = composer._built("case", "{smiles} weighs {output}", "train")
    expected = np.mean([float(text) for text in built.examples("train")[0].columns(["weight"])["weight"]])
    (mean,) = training_means(built, [0])
    assert mean == pytest.approx(expected, rel=0.05)
    asked = composer._prompt("case", "in text")
    targets = [float(answer.reference) for answer in asked.answers]
    assert asked.scores.metrics["unparsable"] == 1, "of a backbone that was never trained"
    assert asked.scores.metrics["mae"] == pytest.approx(np.abs(np.array(targets) - mean).mean(), rel=1e-4)


def test_numbers_are_scored_without_any_training_row(folder: Path, libraries: list[str]) -> None:
    """What is no number counts as 0 then, for there is no mean."""
    file = composed(folder, libraries, {"in text": "{smiles} weighs {output}"}, "test alone")
    path = f"cases.test alone.source.path={{test: {folder / 'rows.csv'}}}"
    composer = opened(file, [path, "cases.test alone.source.output=weight"])
    asked = composer._prompt("test alone", "in text")
    targets = [float(answer.reference) for answer in asked.answers]
    assert asked.scores.metrics["unparsable"] == 1
    assert asked.scores.metrics["mae"] == pytest.approx(np.abs(targets).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"tags": "{smiles} <Q> {output}"}, ("cases.case.prompts.tags.template", '"Q" is no tag')),
        ({"tags": "{smiles} <W> {output}"}, ("either {output} or one tag with a head", "tags with a head here: W")),
        ({"tags": "{smiles} <T>"}, ("either {output} or one tag with a head",)),
        ({"tags": {"template": "{smiles} <W>", "shots": 1}}, ("shots is 1", "Set it to 0")),
        ({"tags": {"copies": "smiles"}}, ("cases.case.prompts", "give it a template")),
        (
            {"tags": {"template": "{smiles} <T> <FR> {output}", "shots": 99}},
            ("cases.case: shots is 99", "train rows", "Ask for fewer"),
        ),
        ({"tags": {"template": "{smiles}", "copies": "smiles"}}, ("exactly one of template and copies",)),
        ({"tags": {"templat": "{smiles}"}}, ("templat is no key", "Did you mean template?")),
        ({"tags": "{smile} <T> {output}"}, ("cases.case.source", "there is no column 'smile'", "Did you mean smiles?")),
    ],
)
def test_mistakes(folder: Path, run: Run, libraries: list[str], prompts: Any, words: tuple[str, ...]) -> None:
    fails(run("compose", composed(folder, libraries, prompts)), *words)


def test_a_case_is_a_folder(folder: Path, run: Run, libraries: list[str]) -> None:
    fails(
        run("compose", composed(folder, libraries, {"tags": "{smiles} <W>"}, "EN/FR")), "cases.EN/FR", "one without a /"
    )
    fails(run("compose", composed(folder, libraries, {"tags": "{smiles} <W>"}, "..")), "cases...:", "one without a /")


def test_bad_rows_may_be_skipped_as_in_training(folder: Path, run: Run, libraries: list[str]) -> None:
    lines = (folder / "rows.csv").read_text().splitlines()
    (folder / "bad.csv").write_text("\n".join([*lines, "CCO,heavy,a,x", ""]))
    file = composed(folder, libraries, {"tags": "{smiles} <W>"}, "bad", split="train")
    override = f"cases.bad.source.path={folder / 'bad.csv'}"
    fails(run("compose", file, override), "weight is 'heavy'", "data.on_bad_row=skip")
    assert run("compose", file, override, "data.on_bad_row=skip").exit_code == 0


def test_fields_are_asked_as_the_tag_was_trained(folder: Path, run: Run) -> None:
    """Spaced, and cut to the same length, so the same prompt scores what `eval` found."""
    template, fields = "{smiles} is <W>", {"smiles": {"characters": "spaced"}}
    file = config(folder, "fields", tags={"W": W}, data__template=template, data__fields=fields)
    assert run("train", file, "data.max_tokens=10").exit_code == 0
    assert run("eval", "runs/fields").exit_code == 0
    expected = json.loads((folder / "runs/fields/results.json").read_text())["metrics"]["mse"]
    library = [str(folder / "runs/fields/library")]
    assert run("compose", composed(folder, library, {"tags": template}, "fields")).exit_code == 0
    assert results_of(folder, "fields")[0]["metrics"]["mse"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("split", "told"), [({"seed": 1}, "'seed': 1"), ({"test": 0.5}, "'test': 0.5"), ({"by": "name"}, "by name")]
)
def test_rows_the_tag_was_trained_on_are_not_scored(
    folder: Path, run: Run, libraries: list[str], split: dict[str, Any], told: str
) -> None:
    file = composed(folder, libraries, {"tags": "<SMILES> {smiles} <W>"}, "seen")
    overrides = [f"cases.seen.source.split.{key}={value}" for key, value in split.items()]
    fails(run("compose", file, *overrides), "cases.seen: its test rows are drawn by", told, "<W> was trained on")
    as_test = f"cases.seen.source.path={{test: {folder / 'rows.csv'}}}"
    fails(run("compose", file, as_test), "cases.seen: its test rows are all of rows.csv, which <W> was trained with")
    for good in ("source.split.test=0.05", "split=train"):  # some of those held out; rows that are known to be seen
        assert run("compose", file, f"cases.seen.{good}").exit_code == 0


def test_a_split_without_rows_is_told(folder: Path, libraries: list[str]) -> None:
    source = {"path": str(folder / "rows.csv"), "target": "weight", "split": {"valid": 0}}
    file = composed(folder, libraries, {"tags": "<SMILES> {smiles} <W>"}, "none", source=source, split="valid")
    with pytest.raises(UserError, match=r"^cases.none: its valid split has no rows. Ask another"):
        opened(file).score("none")
