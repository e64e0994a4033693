"""Configs: what is given, in the file or after it, is checked whole, and each mistake is one helpful line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tagllm.config import HeadConfig, OptimConfig, RunConfig, SourceConfig, TagConfig
from tagllm.config_file import load_config, parse_as
from tagllm.errors import SharedError, UserError, did_you_mean, told_as
from tagllm.files import DamagedFile
from tagllm.run_folder import read_config

BASE: dict[str, Any] = {
    "output": "runs/x",
    "backbone": {"model": "smollm2"},
    "tags": {"SMILES": {"length": 5}, "QED": {"kind": "function", "head": {"outputs": 2}}},
    "data": {"sources": [{"path": "a.csv", "template": "M <SMILES> {smiles} <QED>", "target": ["a", "b"]}]},
    "optim": {"steps": 3},
}


def changed(place: str, value: Any) -> dict[str, Any]:
    """BASE with one more or another value."""
    values = copy.deepcopy(BASE)
    *parents, last = (int(part) if part.isdigit() else part for part in place.split("."))
    inside: Any = values
    for parent in parents:
        inside = inside.setdefault(parent, {}) if isinstance(inside, dict) else inside[parent]
    inside[last] = value
    return values


def problems(values: Any) -> list[str]:
    with pytest.raises(UserError) as raised:
        parse_as(RunConfig, values, "c.yaml")
    return raised.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, list(overrides))
    return str(raised.value)


def test_defaults_stand_where_nothing_is_given(file: Path) -> None:
    config = load_config(file)
    assert (config.seed, config.optim.tag_lr, config.tags["SMILES"].length) == (0, 1e-2, 5)
    assert config.tags["QED"].length == 10
    assert config.data.sources[0].target == ["a", "b"]


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("otuput", "Did you mean output?"),
        ("backbone.modle", "Known: attention, dtype, gradient_checkpointing, model, quantize. Did you mean model?"),
        ("tags.SMILES.lenght", "Did you mean length?"),
        ("tags.QED.head.output", "Did you mean outputs?"),
        ("data.sorces", "Did you mean sources?"),
        ("data.sources.0.tempate", "Did you mean template?"),
        ("data.sources.0.split.validd", "Did you mean valid?"),
        ("data.sources.0.fields.smiles.maxtokens", "Did you mean max_tokens?"),
        ("loss.spam", "Known: output, span, value. Did you mean span?"),
        ("optim.lr", "Did you mean tag_lr?"),
        ("evaluation.evry_steps", "Did you mean every_steps?"),
        ("checkpoint.keeep", "Did you mean keep?"),
        ("engine.zerostage", "Did you mean zero_stage?"),
    ],
)
def test_an_unknown_key_at_every_depth(place: str, hint: str) -> None:
    (told,) = problems(changed(place, 1))
    assert told.startswith(f"c.yaml: {place} is no key of a config. Known: ")
    if place != "optim.lr":  # too short a name to guess from
        assert told.endswith(hint)


def test_a_tag_with_the_name_of_a_key() -> None:
    (told,) = problems(changed("tags.head", {"lenght": 3}))
    assert told == (
        "c.yaml: tags.head.lenght is no key of a config. Known: absent, head, init, kind, learn, length, load. "
        "Did you mean length?"
    )


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("optim.steps", "many", "optim.steps is 'many'; input should be a valid integer"),
        ("optim.steps", 0, "optim.steps is 0; input should be greater than or equal to 1."),
        ("optim.tag_lr", 0, "optim.tag_lr is 0; input should be greater than 0."),
        ("optim.tag_lr", float("nan"), "optim.tag_lr is nan; input should be a finite number."),
        ("data.sources.0.weight", float("inf"), "data.sources.0.weight is inf; input should be a finite number."),
        ("optim.schedule", "cos", "optim.schedule is 'cos'; input should be 'cosine', 'linear' or 'constant'."),
        ("engine.zero_stage", 4, "engine.zero_stage is 4; input should be 'auto', 0, 1, 2 or 3."),
        ("checkpoint.keep", 1, "checkpoint.keep is 1; input should be greater than or equal to 2."),
        ("tags.SMILES.length", 2.5, "tags.SMILES.length is 2.5; input should be a valid integer"),
        ("tags.SMILES", None, "tags.SMILES is None; input should be a valid dictionary"),
        ("tags", {}, "tags is {}; dictionary should have at least 1 item"),
        ("data.sources", [], "data.sources is []; list should have at least 1 item"),
        ("data.sources.0.split.valid", 1, "data.sources.0.split.valid is 1; input should be less than 1."),
        (
            "data.sources.0.split",
            {"valid": 0.5, "test": 0.5},
            "data.sources.0.split: valid + test is 0.5 + 0.5 = 1; it",
        ),
        ("data.sources.0.weight", -1, "data.sources.0.weight is -1; input should be greater than 0."),
        ("output", 3, "output is 3; input should be a valid string."),
    ],
)
def test_a_wrong_value(place: str, value: Any, told: str) -> None:
    (found,) = problems(changed(place, value))
    assert found.startswith(f"c.yaml: {told}")


def test_a_missing_key() -> None:
    values = copy.deepcopy(BASE)
    del values["output"], values["data"]["sources"][0]["template"]
    assert problems(values) == [
        "c.yaml: output is missing; it must be given.",
        "c.yaml: data.sources.0.template is missing; it must be given.",
    ]


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    told = refused(file, "optim.stepz=1", "tags.SMILES.kind=foo", "data.mixx=1", "tags.QED.head.outputs=0")
    lines = told.split("\n")
    assert len(lines) == 4
    assert all(line.startswith(f"{file}: ") for line in lines)
    for place in ("optim.stepz", "tags.SMILES.kind", "data.mixx", "tags.QED.head.outputs"):
        assert sum(place in line for line in lines) == 1


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("optim.tag_lr=1e-2", "optim.tag_lr", 0.01),
        ("optim.tag_lr=3", "optim.tag_lr", 3.0),
        ("optim.clip=null", "optim.clip", None),
        ("optim.betas=[0.8,0.9]", "optim.betas", (0.8, 0.9)),
        ("tags.QED.head.refit=false", "tags.QED.head.refit", False),
        ("tags.QED.head.refit=true", "tags.QED.head.refit", True),
        ("data.sources.0.path=b=c.csv", "data.sources.0.path", "b=c.csv"),
        ("data.sources.0.target=y", "data.sources.0.target", ["y"]),
        ("data.sources.0.fields.smiles.max_tokens=7", "data.sources.0.fields.smiles.max_tokens", 7),
        ("tags.New.length=4", "tags.New.length", 4),
        ("output=runs/a b", "output", "runs/a b"),
        ("output=runs/a #1", "output", "runs/a #1"),
        ("data.sources.0.template={smiles} # is <QED>", "data.sources.0.template", "{smiles} # is <QED>"),
        (
            'data.sources.0.template="# # Input: \\u00e9 {smiles}.\\n# # Output <QED>"',
            "data.sources.0.template",
            "# # Input: \u00e9 {smiles}.\n# # Output <QED>",
        ),
        ("seed=12", "seed", 12),
    ],
)
def test_overrides(file: Path, override: str, place: str, value: Any) -> None:
    found: Any = load_config(file, [override])
    for part in place.split("."):
        found = (
            found[int(part)] if isinstance(found, list) else found[part] if isinstance(found, dict) else
            getattr(found, part)
        )  # fmt: skip
    assert found == value
    assert type(found) is type(value)


def test_an_override_of_one_key_leaves_its_neighbours_and_the_last_one_counts(file: Path) -> None:
    config = load_config(file, ["tags.QED.head.refit=false", "seed=1", "seed=2"])
    assert config.tags["QED"].head == HeadConfig(outputs=2, refit=False)
    assert config.seed == 2


def test_an_empty_mapping_clears_one(file: Path) -> None:
    full = ["data.sources.0.rows={train: 9, test: 200}", "data.sources.0.rows={test: 3}"]
    assert load_config(file, full).data.sources[0].rows == {"train": 9, "test": 3}
    assert load_config(file, [*full, "data.sources.0.rows={}"]).data.sources[0].rows == {}


def test_a_key_of_all_new_tags_needs_one(file: Path) -> None:
    loaded = ["tags={}", "tags.A.load=runs/a/library"]
    told = refused(file, *loaded, "tags.length=4")
    assert told == "override 'tags.length=4': all tags of the config are loaded, and none is new. Leave it out."


def test_a_whole_tag_can_be_added(file: Path) -> None:
    assert load_config(file, ["tags.New={kind: function, length: 3}"]).tags["New"].length == 3


def test_a_key_that_no_tag_has_is_told(file: Path) -> None:
    told = refused(file, "tags.lenth=4")
    assert "lenth is no tag of the config, and no key that all its tags have" in told
    assert told.endswith("Did you mean length?")


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_an_override_that_is_none(file: Path, override: str) -> None:
    assert refused(file, override) == f"override {override!r}: it must read key=value, as in optim.tag_lr=0.01"


@pytest.mark.parametrize(
    "override", ["optim.steps=[", "optim.steps=a: b", "data.sources.4.path=x", "data.sources.x.path=y"]
)
def test_an_override_that_cannot_be_applied(file: Path, override: str) -> None:
    assert refused(file, override).startswith(f"override {override!r}: cannot be applied: ")


def test_an_override_is_checked_like_the_file(file: Path) -> None:
    assert "optim.stepz is no key of a config" in refused(file, "optim.stepz=3")
    assert "seed is {'x': 3}; input should be a valid integer" in refused(file, "seed.x=3")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n- b\n", "a config is a mapping of keys to values"),
        ("a: [\n", "not a readable YAML file"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("3", "not a readable YAML file"),
        ("\x00", "not a readable YAML file"),
        ("output: ${nowhere}\n", "Interpolation key 'nowhere' not found"),
        ("", "output is missing"),
        (
            "template: {smiles} is <QED>\n",
            "not a readable YAML file: line 1, column 20: while parsing a block mapping, did",
        ),
        ("template: {smiles} is <QED>\n", 'stands in quotes, as in template: "{smiles} is <QED>"'),
        ("output: x\ntemplate: {smiles}\n", "template is no key of a config"),
        ("output: The answer: it\n", "mapping values are not allowed in this context. Text with braces or a colon"),
        ("output: {a: [1]}\n", "output is {'a': [1]}; input should be a valid string."),
        ("output: {smiles}\n", "output is {'smiles': None}; input should be a valid string; text that begins with"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    found = refused(path)
    assert found.startswith(f"{path}: ")
    assert told in found


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "no such config. Copy one of configs/quickstart/" in refused(tmp_path / "none.yaml")
    assert "not a readable YAML file" in refused(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "not a readable YAML file" in refused(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"learn": False}, "learn is false but there is no `load: LIBRARY` to take the tag from"),
        ({"load": "a", "length": 3}, "length cannot be given: they come with the library; drop either"),
        ({"load": "a", "kind": "function"}, "come with the library"),
        ({"load": "a", "init": "normal"}, "come with the library"),
        ({"load": "a", "head": {}}, "come with the library"),
        ({"head": {}}, "a head belongs to a function tag; set kind: function"),
        ({"init": "zeros"}, "init is 'zeros'; it must be mean, vocabulary, normal or text:SOME WORDS"),
        (
            {"kind": "function", "head": {"type": "classification"}},
            "a classification head needs `classes: [...]`, the labels as they stand in the data",
        ),
        (
            {"kind": "function", "head": {"type": "classification", "classes": ["a", "b"], "outputs": 3}},
            "outputs is 3 but classes has 2 different names",
        ),
        (
            {"kind": "function", "head": {"type": "classification", "classes": ["a", "a"]}},
            "outputs is 2 but classes has 1 different names",
        ),
        ({"kind": "function", "head": {"kernel": "anova", "refit": False}}, "only a regression with refit: true has"),
        (
            {"kind": "function", "head": {"type": "classification", "classes": ["a", "b"], "kernel": "anova"}},
            "kernel is anova, which only a regression with refit: true has; set kernel: linear",
        ),
    ],
)
def test_rules_of_tags_and_heads(values: dict[str, Any], told: str) -> None:
    (found,) = problems(changed("tags.X", values))
    assert found.startswith("c.yaml: tags.X")
    assert told in found


def test_which_tags_are_learned() -> None:
    assert TagConfig().learned
    assert not TagConfig(load="a").learned
    assert TagConfig(load="a", learn=True).learned
    assert not TagConfig(load="a", learn=False).learned
    assert TagConfig(init="text:a drug").learned


def test_classes_give_the_outputs() -> None:
    assert HeadConfig(type="classification", classes=["a", "b", "c"]).outputs == 3


@pytest.mark.parametrize("values", [{}, {"epochs": 1, "steps": 1}], ids=["neither", "both"])
def test_one_length_of_the_run(values: dict[str, Any]) -> None:
    assert problems(changed("optim", values)) == ["c.yaml: optim: give exactly one of epochs and steps."]
    assert OptimConfig(epochs=0.5).steps is None


@pytest.mark.parametrize("values", [{}, {"path": "a", "hub": "b"}, {"recipe": "a", "path": "b", "hub": "c"}])
def test_one_origin_of_the_rows(values: dict[str, Any]) -> None:
    assert problems(changed("data.sources.0", {"template": "{x}"} | values)) == [
        "c.yaml: data.sources.0: give exactly one of path, recipe and hub."
    ]
    assert SourceConfig(recipe="a", template="{x}").path is None


def test_the_digest_is_of_what_shapes_the_rows_alone() -> None:
    digest = parse_as(RunConfig, BASE, "").digest()
    for place, value in (
        ("output", "b"),
        ("checkpoint.keep", 5),
        ("engine.zero_stage", 3),
        ("remember_gib", 0),
        ("evaluation.beams", 4),
        ("evaluation.rows_per_batch", 4),
    ):
        assert parse_as(RunConfig, changed(place, value), "").digest() == digest, place
    for place, value in (
        ("seed", 1),
        ("optim.tag_lr", 0.5),
        ("tags.SMILES.length", 6),
        ("data.sources.0.template", "N <SMILES> {smiles} <QED>"),
        ("loss.span", 1.0),
    ):
        assert parse_as(RunConfig, changed(place, value), "").digest() != digest, place
    assert parse_as(RunConfig, dict(reversed(BASE.items())), "").digest() == digest
    assert parse_as(RunConfig, changed("seed", 0), "").digest() == digest, "a default said aloud is no change"


def test_a_run_goes_on_under_a_version_with_more_keys() -> None:
    class Later(RunConfig):
        came_later: int = 0

    values = parse_as(RunConfig, BASE, "").model_dump()
    assert Later.model_validate(values).digest() == RunConfig.model_validate(values).digest()
    assert Later.model_validate({**values, "came_later": 1}).digest() != RunConfig.model_validate(values).digest()


def test_a_run_does_not_go_on_under_a_version_with_another_default() -> None:
    """A run folder holds every value; the config of a user does not."""

    class Later(RunConfig):
        seed: int = 7

    held = parse_as(RunConfig, BASE, "").model_dump()
    assert Later.model_validate(held).digest() != Later.model_validate(BASE).digest()


def test_a_config_cannot_be_changed_later_and_survives_json() -> None:
    config = parse_as(RunConfig, BASE, "")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert RunConfig.model_validate_json(config.model_dump_json(exclude_unset=True)) == config


def test_errors_of_all_kinds_are_told_by_the_user_s_own_name_of_the_place() -> None:
    kinds = [(UserError("data.sources.0: a"), UserError), (SharedError("data.sources.0: a"), SharedError)]
    for error, kind in [*kinds, (DamagedFile(Path("data.sources.0"), "a"), UserError)]:
        with pytest.raises(kind, match="^cases.A.source: ") as caught, told_as("cases.A.source", ours="data.sources.0"):
            raise error
        assert type(caught.value) is kind


def test_did_you_mean() -> None:
    assert did_you_mean("Protien", ["SMILES", "Protein"]) == "Known: Protein, SMILES. Did you mean Protein?"
    assert did_you_mean("x", ["SMILES"]) == "Known: SMILES."
    assert did_you_mean("x", []) == "Known: none."


def test_an_error_is_one_line_per_problem() -> None:
    error = UserError("a\n  b", "c")
    assert error.problems == ["a b", "c"]
    assert str(error) == "a b\nc"


def test_labels_that_yaml_takes_for_something_else() -> None:
    assert HeadConfig.model_validate({"classes": [0, 1]}).classes == ["0", "1"]
    assert HeadConfig.model_validate({"classes": ["a", "b"]}).type == "classification"
    for classes, told in (([True, False], "put labels in quotes"), (["a"], "two at least"), (["a", "a"], "different")):
        with pytest.raises(ValidationError, match=told):
            HeadConfig.model_validate({"classes": classes})


def test_a_run_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    """What `${...}` stood for was put in its place then; what is left of it is text."""
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(changed("data.sources.0.template", r"Costs \${price} in ${output}: <SMILES> {smiles}"))
    )
    config = load_config(file)
    assert config.data.sources[0].template == f"Costs ${{price}} in {config.output}: <SMILES> {{smiles}}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert read_config(tmp_path) == config
    assert read_config(tmp_path, ["seed=7"]) == config.model_copy(update={"seed": 7})


def test_paths_are_taken_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the home folder's sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(BASE))
    assert load_config(file, ["output=runs/a #1"]).output == "runs/a #1"
    assert load_config(file, ["output=~/runs"]).output == f"{tmp_path}/runs"
