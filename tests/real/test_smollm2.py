"""The real LLM on real molecules and proteins: what the README promises, at a size a test can afford."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tagllm.config import BackboneConfig
from tagllm.model.backbone import load_backbone
from tests import tiny

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def tagllm(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tagllm", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def smiles_run(runs: Path) -> Path:
    """A quarter of the quickstart's first stage."""
    out = runs / "smiles"
    rows = "data.sources[0].rows={train: 200, valid: 16, test: 48}"
    tagllm("train", "configs/quickstart/1_domain_smiles.yaml", f"output={out}", "optim.steps=12", rows)
    return out


def test_the_converted_model_speaks_english() -> None:
    """Not only loaded: it predicts the obvious next word."""
    backbone = load_backbone(BackboneConfig(model="smollm2", dtype="fp32"), torch.device("cpu"))
    ids = backbone.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = backbone.model(ids).logits[0, -1].argmax()
    assert backbone.tokenizer.decode(best).strip() == "Paris"
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert tiny.weights_digest(backbone.model) == tiny.weights_digest(backbone.model)


def test_a_domain_tag_learns_molecules(smiles_run: Path) -> None:
    tagllm("eval", str(smiles_run))
    results = json.loads((smiles_run / "results.json").read_text())
    with_tag, without = results["metrics"]["span_nats"], results["controls"]["no tag"]["span_nats"]
    assert with_tag < 0.75 * without
    assert with_tag < 0.8 * results["controls"]["untrained tag"]["span_nats"]


def test_a_function_tag_on_top_of_it_and_predictions(smiles_run: Path, runs: Path) -> None:
    """Stage 2 with the domain tag of stage 1: better than the mean, and a file of predictions in chemistry's order."""
    out = runs / "qed"
    tags = f"tags.SMILES={{load: {smiles_run / 'library'}}}"
    template = 'data.sources[0].template="The molecule is <SMILES> {smiles}. Its drug-likeness is <QED>"'
    rows = "data.sources[0].rows={train: 160, valid: 32, test: 64}"
    tagllm(
        "train", "configs/quickstart/2_function_qed.yaml", f"output={out}", tags, template, rows, "optim.epochs=1",
    )  # fmt: skip
    tagllm("eval", str(out))
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"]["mse"] < results["baselines"]["predict_mean"]["mse"]
    assert {"ridge_last", "ridge_mean"} <= results["baselines"].keys()
    table = runs / "new.csv"
    table.write_text("smiles\nCC(=O)Oc1ccccc1C(=O)O\nCCCCCCCCCCCCCCCCCCCC\n")
    tagllm("predict", str(out), str(table), str(runs / "predicted.csv"))
    aspirin, wax = (float(line.split(",")[1]) for line in (runs / "predicted.csv").read_text().splitlines()[1:])
    assert aspirin > wax
