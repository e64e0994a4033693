"""What tests of commands share: a table, a backbone, and a command to run on them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tagllm.cli import app
from tests import tiny
from tests.commands import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone and a small table of molecules, `weight` being a simple function of the text."""
    root = tmp_path_factory.mktemp("cli")
    tiny.save_backbone(root / "backbone")
    random = np.random.default_rng(0)
    with (root / "rows.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["smiles", "weight", "kind", "name"])
        for i in range(60):
            smiles = "".join(random.choice(list("CNOc1()="), random.integers(4, 12)))
            writer.writerow([f"{smiles}{i}", f"{len(smiles) + random.normal() * 0.1:.3f}", "ab"[i % 2], f"x{i % 7}"])
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TAGLLM_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
