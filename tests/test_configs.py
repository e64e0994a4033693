"""Every config we ship is good, the reference names every key, and what the README shows works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from tagllm.cli import app
from tagllm.config import RunConfig, load_config
from tagllm.errors import UserError
from tagllm.stage import read_stage

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the libraries of earlier stages, which are there only after these have run."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    loads = [tag.load for tag in config.tags.values() if tag.load and not Path(tag.load).exists()]
    if not loads:
        read_stage(config, str(path))
        return
    with pytest.raises(UserError) as caught:
        read_stage(config, str(path))
    problems = caught.value.problems
    assert all("not a tag library" in problem for problem in problems)
    assert all(any(load in problem for problem in problems) for load in loads)


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


def test_the_reference_names_every_key() -> None:
    document = yaml.safe_load((ROOT / "configs" / "reference.yaml").read_text())
    assert keys(RunConfig) <= names(document)
    assert not keys(RunConfig) - names(document)


def test_the_readme_config_is_good(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    (tmp_path / "solubility.yaml").write_text(block[1])
    read_stage(load_config(tmp_path / "solubility.yaml"), "README.md")


@pytest.mark.parametrize("line", re.findall(r"^(?:tagllm|python -m tagllm) .*$", README, re.MULTILINE))
def test_every_readme_command_parses(line: str) -> None:
    """The words of the command are known: commands and options exist. What it does is tested with tiny models."""
    words = shlex.split(line, comments=True)
    command = words[words.index("tagllm") + 1]
    options = {word for word in words if word.startswith("--")}
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "Usage" in shown
    assert all(option in shown for option in options)
