"""A stage as data: its terms, its tags, and the settings that contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tagllm.config import HeadConfig, RunConfig
from tagllm.config_file import parse_as
from tagllm.contradictions import check_world
from tagllm.errors import UserError
from tagllm.head import Head
from tagllm.model.loss import LossWeights
from tagllm.stage import read_stage
from tagllm.tags import BackboneIdentity, Tag, TagLibrary
from tagllm.template import OUTPUT, SPAN
from tagllm.train.rows import StepRows

FUNCTION = {"kind": "function"}
HEAD = {"kind": "function", "head": {}}


def config(
    tags: dict[str, Any], *templates: str, target: str | list[str] = (), loss: Any = None, **more: Any
) -> RunConfig:
    sources = [{"path": "a.csv", "template": template, "target": target or [], **more} for template in templates]
    optim = {"steps": 1, "rows_per_step": 100, "rows_per_micro_batch": 4}
    return parse_as(RunConfig,
        {"output": "o", "backbone": {"model": "m"}, "tags": tags, "data": {"sources": sources}, "optim": optim,
         "loss": loss or {}}, "c.yaml",
    )  # fmt: skip


def problems(*args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(UserError) as raised:
        read_stage(config(*args, **kwargs), "c.yaml")
    return raised.value.problems


@pytest.fixture
def library(tmp_path: Path) -> str:
    head = Head.new(HeadConfig(outputs=2), 8)
    made = TagLibrary(BackboneIdentity("m", "llama", 8, 96, "f" * 64))
    made = made.add(Tag("SMILES", "domain", torch.zeros(7, 8))).add(Tag("QED", "function", torch.zeros(3, 8), head))
    made.save(tmp_path / "library")
    return str(tmp_path / "library")


@pytest.mark.parametrize(
    ("tags", "template", "target", "weights"),
    [
        ({"D": {}}, "<D> {x}", [], (1, 0, 0)),
        ({"D": {}, "F": HEAD}, "<D> {x} <F>", "y", (0, 0, 1)),
        ({"D": {}, "F": FUNCTION}, "<D> {x} <F> {output}", [], (0, 1, 0)),
        ({"D": {}, "F": HEAD}, "<D> {x} <F> {output}", "y", (0, 1, 1)),
    ],
    ids=["domain text", "a value", "text out", "both"],
)
def test_default_weights(tags: dict[str, Any], template: str, target: Any, weights: tuple[float, ...]) -> None:
    stage = read_stage(config(tags, template, target=target), "c.yaml")
    assert stage.weights == LossWeights(*weights)
    assert stage.terms == tuple(mark for mark, weight in ((SPAN, weights[0]), (OUTPUT, weights[1])) if weight)


def test_given_weights_win_one_by_one() -> None:
    stage = read_stage(config({"D": {}, "F": HEAD}, "<D> {x} <F>", target="y", loss={"span": 0.3}), "c.yaml")
    assert stage.weights == LossWeights(0.3, 0, 1)
    assert stage.terms == (SPAN,)


def test_loaded_tags_are_frozen_and_bring_kind_length_and_head(library: str) -> None:
    tags = {"SMILES": {"load": library}, "QED": {"load": library, "learn": True}, "New": {"length": 4}}
    stage = read_stage(config(tags, "<SMILES> {x} <New> {z} <QED>", target=["a", "b"]), "c.yaml")
    assert stage.learned == ["QED", "New"]
    layout = stage.layout(96)
    assert layout.kinds == {"SMILES": "domain", "QED": "function", "New": "domain"}
    assert layout.lengths == {"SMILES": 7, "QED": 3, "New": 4}
    assert layout.first_learned_id == 96 + 7
    assert layout.heads == {"QED": HeadConfig(outputs=2)}
    collator = stage.collator(layout, free_spans=True)
    assert (collator.first_learned_id, collator.terms, collator.num_outputs) == (103, (), 2)


def test_the_plain_backward_has_no_prefix() -> None:
    plain = config({"D": {}}, "a <D> {x}").model_copy(update={"prefix": "full"})
    stage = read_stage(plain, "c.yaml")
    assert not stage.collator(stage.layout(10), free_spans=True).frozen_prefix


@pytest.mark.parametrize(("key", "value"), [("prefix", "full"), ("engine", {"zero_stage": 3})])
def test_remembering_is_refused_where_it_cannot_be(key: str, value: object) -> None:
    """And left out of a config it is off there."""
    plain = config({"D": {}}, "a <D> {x}").model_dump() | {key: value}
    assert RunConfig.model_validate(plain).remembered_bytes == (0, 0)
    with pytest.raises(UserError, match=r"c.yaml: remember_gib is 1.0 and remember_device_gib 0, but .* Set both to 0"):
        read_stage(RunConfig.model_validate(plain | {"remember_gib": 1.0}), "c.yaml")


def test_text_needs_the_causal_mask() -> None:
    """Generation knows no other; training under one mask and writing under another would be silently off."""
    block = config({"D": {}}, "<D> {x} {output}").model_copy(update={"mask": "block"})
    with pytest.raises(UserError, match=r"c.yaml: mask is block, but a template has \{output\}; .* Set mask=causal."):
        read_stage(block, "c.yaml")


def test_the_answer_is_never_cut() -> None:
    assert problems({"D": {}}, "<D> {x} {output}", fields={"output": {"max_tokens": 3}}) == [
        "c.yaml: data.sources.0.fields.output.max_tokens is 3; the answer is never cut. Drop it, or leave long "
        "rows out with max_characters."
    ]


def test_a_bad_name() -> None:
    assert "c.yaml: tags.2D: a tag's name is letters, digits, - and _, a letter first." in problems(
        {"2D": {}}, "<2D> {x}"
    )


def test_loading_what_is_not_there(library: str, tmp_path: Path) -> None:
    tags = {"SMILE": {"load": library}, "QED": {"load": str(tmp_path)}, "D": {}}
    assert problems(tags, "<D> {x} <SMILE> <QED>") == [
        f'c.yaml: tags.SMILE.load: {library}: it holds no tag "SMILE". Known: QED, SMILES. Did you mean SMILES?',
        f"{tmp_path}: not a tag library (no library.json). A run keeps its own in RUN/library.",
    ]


def test_mistakes_in_templates_name_their_source() -> None:
    assert problems({"D": {}}, "<D> {x}", "<E> {x}", "<D> {x} {") == [
        'c.yaml: data.sources.1.template: "E" is no tag. Known: D.',
        "c.yaml: data.sources.2.template: a brace without its other half in ' {'; write \\{ for a brace.",
    ]


def test_an_unused_tag() -> None:
    assert problems({"D": {}, "E": {}}, "<D> {x}") == [
        "c.yaml: tags.E stands in no template; put <E> in one, or drop the tag."
    ]


def test_nothing_is_learned(library: str) -> None:
    found = problems({"SMILES": {"load": library}}, "<SMILES> {x}")
    assert "c.yaml: tags: none is learned; leave `load` out of one, or set learn: true." in found


def test_two_heads_in_a_template() -> None:
    assert problems({"F": HEAD, "G": HEAD}, "{x} <F> <G>", target="y") == [
        "c.yaml: data.sources.0.template: F, G all have heads; one per template can answer."
    ]


@pytest.mark.parametrize(
    ("head", "target", "told"),
    [
        ({"outputs": 2}, "y", "names 1 columns (y); the head of F needs 2."),
        ({}, [], "names 0 columns (none); the head of F needs 1."),
        ({}, "x", "is x, which the prompt shows as {x}: the model would read its answer. Take it out of the template."),
        (
            {"type": "classification", "classes": ["a", "b"]},
            ["y", "z"],
            "names 2 columns (y, z); the head of F needs 1.",
        ),
    ],
)
def test_targets_that_do_not_fit_the_head(head: dict[str, Any], target: Any, told: str) -> None:
    found = problems({"F": {"kind": "function", "head": head}}, "{x} <F>", target=target)
    assert found == [f"c.yaml: data.sources.0.target {told}"]


def test_a_target_without_a_head() -> None:
    assert problems({"D": {}}, "<D> {x}", target="y") == [
        "c.yaml: data.sources.0.target names 1 columns (y); the head of the template (it has none) needs 0."
    ]


def test_a_setting_for_a_field_that_is_not_there() -> None:
    assert problems({"D": {}}, "<D> {sequence}", fields={"sequnce": {}}) == [
        "c.yaml: data.sources.0.fields.sequnce: the template has no {sequnce}. Known: sequence. Did you mean sequence?"
    ]


def test_a_source_without_a_learned_tag(library: str) -> None:
    tags = {"SMILES": {"load": library}, "D": {}}
    assert problems(tags, "<D> {x}", "<SMILES> {x}") == [
        "c.yaml: data.sources.1.template has none of the learned tags (D)."
    ]


@pytest.mark.parametrize(
    ("template", "loss"), [("{x} <D>", {}), ("<D> then {x}", {}), ("<D> {x}", {"span": 0})]
)  # fmt: skip
def test_nothing_is_supervised(template: str, loss: dict[str, float]) -> None:
    (found,) = problems({"D": {}}, template, loss=loss)
    assert found.startswith("c.yaml: data.sources.0: nothing in the prompt is supervised; the template needs {output}")


def test_all_contradictions_at_once() -> None:
    assert len(problems({"D": {}, "E": {}, "F": HEAD}, "<D> {x} <F>", "{x}", fields={"z": {}})) == 6


@pytest.mark.parametrize(
    ("ranks", "fewer", "near"), [(8, 5, "96 or 104"), (3, 2, "99 or 102"), (101, 100, "101"), (30, 25, "90 or 120")]
)
def test_rows_that_do_not_divide(ranks: int, fewer: int, near: str) -> None:
    with pytest.raises(UserError) as raised:
        check_world(config({"D": {}}, "<D> {x}"), ranks, "c.yaml")
    assert str(raised.value) == (
        f"c.yaml: optim.rows_per_step is 100; it must be a multiple of the number of ranks, {ranks}. Start {fewer}, or "
        f"train with {near} rows per step."
    )


@pytest.mark.parametrize("ranks", [1, 2, 5, 50])
def test_rows_that_divide(ranks: int) -> None:
    check_world(config({"D": {}}, "<D> {x}"), ranks, "c.yaml")


@pytest.mark.parametrize("name", ["type", "half", "train", "values"])
def test_a_name_that_torch_has_a_meaning_for_is_refused_for_heads_only(name: str) -> None:
    (problem,) = problems({name: HEAD}, f"{{x}} <{name}>", target="y")
    assert f"tags.{name}: a tag with a head cannot be called {name}" in problem and name.capitalize() in problem
    read_stage(config({name: {}}, f"<{name}> {{x}}"), "c.yaml")
    read_stage(config({name.capitalize(): HEAD}, f"{{x}} <{name.capitalize()}>", target="y"), "c.yaml")


def tuned(source: dict[str, Any], **sections: Any) -> RunConfig:
    """Of two sources, the second one as it is told."""
    made = config({"D": {}}, "<D> {x}", "<D> {x}").model_dump(exclude_unset=True)
    made["data"]["sources"][0]["split"] = {"valid": 0.0}
    made["data"]["sources"][1] |= {"split": {"valid": 0.0}} | source
    made["data"] |= sections.pop("data", {})
    return parse_as(RunConfig, {**made, **sections}, "c.yaml")


PATIENT = {"evaluation": {"patience": 3}}


@pytest.mark.parametrize("source", [{}, {"path": {"train": "a.csv", "test": "b.csv"}}])
def test_patience_without_rows_to_validate_on_is_refused(source: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^c.yaml: evaluation.patience is 3, but no source has .* Set split.valid"):
        read_stage(tuned(source, **PATIENT), "c.yaml")
    read_stage(tuned(source), "c.yaml")


@pytest.mark.parametrize(
    "source",
    [
        {"split": {"valid": 0.2}},
        {"path": {"train": "a.csv", "valid": "b.csv"}},
        {"path": None, "hub": "a"},
        {"path": None, "recipe": "a"},
    ],
    ids=str,
)
def test_patience_is_taken_where_there_may_be_some(source: dict[str, Any]) -> None:
    read_stage(tuned(source, **PATIENT), "c.yaml")


@pytest.mark.parametrize("mix", ["proportional", "equal"])
def test_a_weight_that_the_mix_does_not_look_at_is_refused(mix: str) -> None:
    told = rf"^c.yaml: data.sources.1.weight is 2.5, but data.mix is {mix}, .* Set data.mix=given, or leave weight out"
    with pytest.raises(UserError, match=told):
        read_stage(tuned({"weight": 2.5}, data={"mix": mix}), "c.yaml")
    read_stage(tuned({"weight": 2.5}, data={"mix": "given"}), "c.yaml")
    read_stage(tuned({"weight": 1.0}, data={"mix": mix}), "c.yaml")


def test_a_size_of_groups_that_nothing_makes_is_refused() -> None:
    with pytest.raises(UserError, match=r"^c.yaml: data.sources.1.rows_per_group is 4, but .* Set group_by"):
        read_stage(tuned({"rows_per_group": 4}), "c.yaml")
    read_stage(tuned({"rows_per_group": 4, "group_by": "x"}), "c.yaml")


def test_a_head_must_answer_before_the_output() -> None:
    (told,) = problems({"F": HEAD}, "{x} {output} <F>", target="y")
    assert "<F> stands behind {output}, which is not there yet" in told and "Put the tag before it" in told


def test_a_weight_too_small_for_any_row_is_refused() -> None:
    """A function tag that stands only there would never be trained."""
    given = config({"D": {}}, "a <D> {x}", "b <D> {x}").model_dump()
    given["data"] |= {
        "mix": "given",
        "sources": [one | {"weight": w} for one, w in zip(given["data"]["sources"], (1, 0.002), strict=True)],
    }
    rows: Any = [range(100), range(100)]
    with pytest.raises(
        UserError, match=r"data.sources.1.weight is 0.002, .* none of the 200 rows of an epoch.*Raise it"
    ):
        StepRows(RunConfig.model_validate(given), rows, 0, 1)
