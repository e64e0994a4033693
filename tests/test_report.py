"""The report: every run with what it must beat, on one page that needs nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tagllm.cli import app
from tagllm.report.tags import nearest_tokens
from tests import tiny
from tests.test_monitor import CHROMIUM

RUNNER = CliRunner()
PROMPT = "<S> {smiles} <QED>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained and scored; its name has what HTML would take for markup."""
    folder = tmp_path_factory.mktemp("report")
    tiny.save_backbone(folder / "backbone")
    rows = dict.fromkeys(f"{'C' * (n % 11 + 1)}O{'N' * (n % 5)},{(n % 11) / 10}" for n in range(120))
    (folder / "rows.csv").write_text("smiles,qed\n" + "\n".join(rows) + "\n")
    config = {
        "output": str(folder / "a<b>&c"), "backbone": {"model": str(folder / "backbone"), "dtype": "fp32"},
        "tags": {"S": {"length": 2}, "QED": {"kind": "function", "length": 2, "head": {}}},
        "data": {"sources": [{"path": str(folder / "rows.csv"), "template": PROMPT, "target": "qed"}]},
        "optim": {"steps": 4, "rows_per_step": 4, "rows_per_micro_batch": 4},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    for command in (["train", str(folder / "run.yaml")], ["eval", str(folder / "a<b>&c")]):
        done = subprocess.run([sys.executable, "-m", "tagllm", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder / "a<b>&c"


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    result = RUNNER.invoke(app, ["report", str(run), "--out", str(run.parent / "out")])
    assert result.exit_code == 0, result.stderr
    return (run.parent / "out" / "report.html").read_text()


def test_every_method_has_a_row_and_one_of_them_is_best(page: str) -> None:
    methods = re.findall(r"<tr[^>]*><td>([a-z_ ]+)</td>", page)
    assert methods[0] == "tag"
    assert {"predict_mean", "ridge_last", "nearest_row", "boosting_fingerprints"} <= set(methods)
    assert page.count('class="best"') >= len(re.findall(r"<th>", page)) - 1


def test_nothing_is_fetched(page: str) -> None:
    """A page that is mailed to somebody opens on a plane."""
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|"http://www.w3.org[^"]*"', "", page).replace("&lt;", "")


def test_names_are_text_and_figures_are_there(page: str) -> None:
    assert "a&lt;b&gt;&amp;c" in page and "a<b>" not in page
    assert page.count("<svg") == 3, "learning curve, predictions, tags"
    assert "The paper, &lt;QED&gt;, mse" in page
    assert "The tag, 95 % over draws of the rows" in page


def test_markdown_has_the_same_numbers(run: Path, page: str) -> None:
    text = (run.parent / "out" / "report.md").read_text()
    for cell in re.findall(r"<td[^>]*>([0-9.e-]+)</td>", page):
        assert f"| {cell} |" in text


def test_a_run_without_results_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("results.json"))
    result = RUNNER.invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert f"Score it first: tagllm eval {tmp_path / 'run'}" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser (Debian: chromium)")
def test_it_fits_a_phone(run: Path, page: str, tmp_path: Path) -> None:
    """In a real browser of a phone's width the page is no wider than the screen; tables scroll by themselves."""
    probe = page.replace("</html>", "<script>document.title = document.documentElement.scrollWidth</script></html>")
    (tmp_path / "page.html").write_text(probe)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    shown = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    (width,) = re.findall(r"<title>(\d+)</title>", shown)
    assert int(width) <= 500


def test_inspect_finds_the_tokens_that_a_row_was_made_of(run: Path, tmp_path: Path) -> None:
    backbone = tiny.plain_backbone()
    embedding_VD = backbone.get_input_embeddings().weight.detach()
    rows_PD = embedding_VD[[7, 30]] * torch.tensor([[3.0], [0.2]])
    cosines, ids = nearest_tokens(rows_PD, embedding_VD, 3)
    assert ids[:, 0].tolist() == [7, 30]
    assert cosines[:, 0].tolist() == pytest.approx([1, 1])
    assert (cosines.diff(dim=1) <= 0).all()
    result = RUNNER.invoke(app, ["inspect", str(run / "library"), "--nearest", "2"])
    assert result.exit_code == 0, result.stderr
    assert "<QED>, function; a token's norm is" in result.stdout and "cosine of mean rows" in result.stdout
    other = tiny.save_backbone(tmp_path / "other")
    tiny.backbone(seed=5).save_pretrained(other)
    refused = RUNNER.invoke(app, ["inspect", str(run / "library"), "--model", str(other)])
    assert refused.exit_code == 2 and "backbone" in refused.stderr
