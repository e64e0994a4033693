"""What tests of commands share: a config over the table of `conftest.py`, and how a mistake is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from typer.testing import Result

Run = Callable[..., Result]


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
