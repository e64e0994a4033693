"""Every config we ship is good, the reference names every key, and what the README shows works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from tagllm.cli import app
from tagllm.compose_config import CaseConfig, ComposeConfig, PromptConfig, check_compose
from tagllm.config import RunConfig
from tagllm.config_file import load_as, load_config
from tagllm.contradictions import check_world
from tagllm.data.dataset import check_columns
from tagllm.data.recipes import recipe_of
from tagllm.errors import UserError
from tagllm.head import Head
from tagllm.stage import read_stage
from tagllm.sweep.points import Sweep
from tagllm.tags import BackboneIdentity, Tag, TagLibrary
from tagllm.template import parse_template

ROOT = Path(__file__).parents[1]
VARIANTS = sorted((ROOT / "configs" / "variants").glob("*.yaml"))
COMPOSED = sorted([*(ROOT / "configs").glob("*/4_*.yaml"), ROOT / "configs" / "compose_reference.yaml"])
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*VARIANTS, *COMPOSED})
TRANSLATE = ROOT / "configs" / "offline" / "3_translate.yaml"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under eight ranks too; all but the libraries of earlier stages, which are there only after these have run."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    check_world(config, 8, str(path))
    kinds = dict.fromkeys(config.tags, "domain")
    for source in config.data.sources:
        if source.recipe is not None:
            template = parse_template(source.template, kinds)
            check_columns(source, template, list(recipe_of(source.recipe).columns), source.recipe)
    loads = [tag.load for tag in config.tags.values() if tag.load and not Path(tag.load).exists()]
    if not loads:
        read_stage(config, str(path))
        return
    with pytest.raises(UserError) as caught:
        read_stage(config, str(path))
    problems = caught.value.problems
    assert all("not a tag library" in problem for problem in problems), problems
    assert all(any(load in problem for problem in problems) for load in loads)


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_every_variant_is_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first line says the command."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(path.read_text().splitlines()[0].partition("tagllm sweep")[2])
    assert words[1:3] == ["--variants", str(path.relative_to(ROOT))]
    overrides = [word for word in words[3:] if "=" in word]
    points = Sweep.of(Path(words[0]), overrides, [], 1, path).finals()
    assert {point.shown["variant"] for point in points} == set(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", COMPOSED, ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_every_compose_config_is_good(path: Path) -> None:
    """With libraries that hold the tags of the configs that make them."""
    config = load_as(ComposeConfig, path)
    made = {f"{of.output}/library": of for of in map(load_config, CONFIGS)}
    assert path.stem == "compose_reference" or set(config.libraries) <= set(made)
    trained = [made[folder] for folder in config.libraries if folder in made] or [load_config(TRANSLATE)]
    tags = {
        name: Tag(name, tag.kind, torch.zeros(1, 4), Head.new(tag.head, 4) if tag.head else None)
        for of in trained
        for name, tag in of.tags.items()
    }
    if path.stem == "compose_reference":
        tags |= {name: Tag(name, "domain", torch.zeros(1, 4)) for name in ("ES", "PT")}
    check_compose(config, TagLibrary(BackboneIdentity("tiny", "llama", 4, 4, ""), tags))
    kinds = {name: tag.kind for name, tag in tags.items()}
    for case in config.cases.values():
        columns = recipe_of(case.source.recipe).columns if case.source.recipe else {}
        for prompt in case.prompts.values():
            fields = [prompt.copies] if prompt.copies else parse_template(prompt.template, kinds).fields
            assert not columns or {*fields, *case.source.target} <= {*columns}


def keys(model: type[BaseModel]) -> set[str]:
    found = set(model.model_fields)
    for field in model.model_fields.values():
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= keys(inner)
    return found


def names(document: Any) -> set[str]:
    if isinstance(document, dict):
        return set(document) | {name for value in document.values() for name in names(value)}
    return {name for value in document for name in names(value)} if isinstance(document, list) else set()


EXAMPLES = {"epochs", "recipe", "target", "fields", "max_characters", "rows"}
"""Keys of the reference that show what may be given, where the default is nothing."""


def test_the_reference_names_every_key() -> None:
    document = yaml.safe_load((ROOT / "configs" / "reference.yaml").read_text())
    assert keys(RunConfig) <= names(document)


def test_the_reference_has_the_defaults() -> None:
    """As its first line says: what it gives for a key that need not be given is what holds without it."""
    file = ROOT / "configs" / "reference.yaml"
    others = []

    def compare(model: BaseModel, given: dict[str, Any], at: str) -> None:
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                compare(value, given.get(name, {}), f"{at}.{name}")
            elif name in given and not field.is_required() and name not in EXAMPLES:
                others.extend([f"{at}.{name}"] * (value != field.get_default(call_default_factory=True)))

    loaded = load_config(file)
    compare(loaded, yaml.safe_load(file.read_text()), "")
    assert not others


def test_the_reference_of_compose_names_every_key() -> None:
    document = yaml.safe_load((ROOT / "configs" / "compose_reference.yaml").read_text())
    known = set(ComposeConfig.model_fields) | set(CaseConfig.model_fields) | set(PromptConfig.model_fields)
    assert not known - names(document)


def test_the_readme_config_is_good(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    (tmp_path / "solubility.yaml").write_text(block[1])
    config = load_config(tmp_path / "solubility.yaml")
    read_stage(config, "README.md")
    check_world(config, 8, "README.md")


@pytest.mark.parametrize("line", re.findall(r"^(?:tagllm|python -m tagllm) .*$", README, re.MULTILINE))
def test_every_readme_command_parses(line: str) -> None:
    """The words of the command are known: commands and options exist. What it does is tested with tiny models."""
    words = shlex.split(line, comments=True)
    command = words[words.index("tagllm") + 1]
    options = {word for word in words if word.startswith("--")}
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "Usage" in shown
    assert all(option in shown for option in options)


def test_the_readme_activates_the_venv_before_its_first_command() -> None:
    lines = README.splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("tagllm "))
    assert lines[first - 1].startswith(". .venv/bin/activate ") and lines[first - 2] == "```"


def test_the_quickstart_installs_what_baseline_trains() -> None:
    extras = dict(re.findall(r'^ {8}"(\w+)": \[(.*)\],$', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert extras["baselines"] in extras["quickstart"]


def test_every_experiment_has_its_configs() -> None:
    """launch/experiment.sh names them by their file."""
    script = (ROOT / "launch" / "experiment.sh").read_text()
    names = re.search(r"^# NAME: (.*)$", script, re.MULTILINE)
    assert names is not None
    stems = {path.stem for path in (ROOT / "configs" / "offline").glob("[23]_*.yaml")}
    assert {stem.partition("_")[2] for stem in stems} == set(names[1].split())
    for found in re.findall(r"domains=\(([\w ]+)\)", script):
        assert all((ROOT / "configs" / "offline" / f"{stem}.yaml").is_file() for stem in found.split())


def without_settings() -> dict[str, str]:
    """The environment, but for what a developer may have set for experiments of their own."""
    settings = (
        "CONFIGS",
        "BACKBONE",
        "OUT",
        "TUNE",
        "ABLATE",
        "VARIANTS",
        "SEEDS",
        "JOBS",
        "BASELINES",
        "BUDGET_S",
        "FIT_ROWS",
    )
    return {name: value for name, value in os.environ.items() if name not in settings}


def asked_by_experiment(folder: Path, *arguments: str, **settings: str) -> list[str]:
    """What experiment.sh has tagllm do in `folder`, with a python3 that only notes what it is asked, where Debian's
    package is not installed."""
    (folder / "launch").mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    script, text = folder / "launch" / "experiment.sh", (ROOT / "launch" / "experiment.sh").read_text()
    script.write_text(text.replace("/usr/share/doc/mmseqs2/example-data", str(folder / "none")))
    (folder / "python3").write_text('#!/bin/sh\necho "$@" >> asked\n')
    (folder / "python3").chmod(0o755)
    environment = without_settings() | {"PATH": f"{folder}:{os.environ['PATH']}", **settings}
    subprocess.run(["bash", script, *arguments], cwd=folder, env=environment, timeout=60, check=True)
    return [line.removeprefix("-m tagllm ") for line in (folder / "asked").read_text().splitlines()]


@pytest.mark.parametrize("folder", [None, "raw"])
def test_an_experiment_without_a_folder_takes_what_was_prepared(folder: str | None, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    arguments = [str(tmp_path / folder)] if folder else []
    asked = asked_by_experiment(tmp_path, "binding_affinity", *arguments, BACKBONE="/models/other")
    given = f" --from {tmp_path / 'raw'}" if folder else ""
    assert [line for line in asked if line.startswith("prepare")] == [
        f"prepare davis{given}",
        "prepare mmseqs-proteins",
    ]
    of_backbone = [line for line in asked if line.startswith(("train", "sweep", "compose"))]
    assert len(of_backbone) == 4 and all("backbone.model=/models/other" in line for line in of_backbone)
    configs = {line.split()[1] for line in of_backbone}
    assert configs == {
        f"runs/offline-other/configs/{stem}.yaml"
        for stem in ("1_protein", "1_smiles", "3_binding_affinity", "4_binding_affinity")
    }
    for config in configs:  # nothing of SmolLM2's runs is taken or overwritten
        of_smollm2 = (ROOT / "configs" / "offline" / Path(config).name).read_text()
        assert (tmp_path / config).read_text() == of_smollm2.replace("runs/offline/", "runs/offline-other/")


@pytest.mark.parametrize(
    ("name", "prepared"), [("qed", []), ("translate", []), ("drug_combination", ["prepare drugcomb-css"])]
)
def test_an_experiment_of_the_paper_asks_no_data_of_ours(name: str, prepared: list[str], tmp_path: Path) -> None:
    asked = asked_by_experiment(tmp_path, name, CONFIGS="paper")
    assert [line for line in asked if line.startswith("prepare")] == prepared
    used = [line.split()[1] for line in asked if line.startswith(("train", "sweep", "compose"))]
    assert used and all(path.startswith("configs/paper/") and (ROOT / path).is_file() for path in used)


@pytest.mark.parametrize(("configs", "file"), [("offline", "drug_combination"), ("paper", "paper_drug_combination")])
def test_an_experiment_runs_its_ablations_where_that_is_asked(configs: str, file: str, tmp_path: Path) -> None:
    asked = asked_by_experiment(tmp_path, "drug_combination", CONFIGS=configs, VARIANTS="1")
    (sweep,) = (line for line in asked if line.startswith("sweep"))
    assert f"--variants configs/variants/{file}.yaml --seeds 3" in sweep
    assert next(iter(yaml.safe_load((ROOT / "configs/variants" / f"{file}.yaml").read_text()).values())) == {}, "full"
    done = subprocess.run(
        ["bash", ROOT / "launch" / "experiment.sh", "qed"],
        env=without_settings() | {"VARIANTS": "1", "CONFIGS": "paper"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "there is no configs/variants/paper_qed.yaml" in done.stderr


@pytest.mark.parametrize(
    ("name", "sized"),
    [
        ("qed", "--method=prompt_tuning --method=lora --seeds 3 --jobs 1"),
        ("descriptor", "--method=prompt_tuning --method=lora --seeds 3 --jobs 1 --fit-rows 2000 --budget-s 600"),
        ("synergy_loewe", "--method=prompt_tuning --method=lora --seeds 1 --jobs 1 --fit-rows 1000 --budget-s 600"),
        ("binding_affinity", "--method=prompt_tuning --seeds 1 --jobs 1 --fit-rows 512 --budget-s 600"),
    ],
)
def test_trained_baselines_are_of_a_size_that_two_cores_can_do(name: str, sized: str, tmp_path: Path) -> None:
    (baseline,) = (line for line in asked_by_experiment(tmp_path, name) if line.startswith("baseline"))
    assert baseline.endswith(sized)


def test_translation_has_no_trained_baselines_whatever_is_asked(tmp_path: Path) -> None:
    asked = {line.split()[0] for line in asked_by_experiment(tmp_path, "translate", BASELINES="lora")}
    assert {"sweep", "report"} <= asked and "baseline" not in asked


@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="needs the .venv that the quickstart uses")
def test_the_quickstart_tells_a_mistake_before_it_trains(tmp_path: Path) -> None:
    """Its own Python lines too are of this version."""
    command = ["bash", "launch/quickstart.sh", "optim.stpes=3", f"output={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "optim.stpes is no key" in done.stderr and "Did you mean steps?" in done.stderr
    assert not (tmp_path / "run").exists()
