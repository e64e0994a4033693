"""The report: every run with what it must beat, on one page that needs nothing else."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tagllm.cli import app
from tagllm.config import HeadConfig
from tagllm.digits import digits
from tagllm.errors import UserError
from tagllm.origin import ORIGIN
from tagllm.report.collect import Run, collect
from tagllm.report.paper import published_of
from tagllm.report.sections import _rate
from tagllm.report.tables import Cell
from tagllm.report.tags import nearest_tokens
from tagllm.tags import TagLibrary
from tests import tiny
from tests.test_monitor import CHROMIUM
from tests.test_tags import leaving_the_tag_out

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
    for command in (["train", str(folder / "run.yaml")], ["eval", str(folder / "a<b>&c"), "--ablate"]):
        done = subprocess.run([sys.executable, "-m", "tagllm", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder / "a<b>&c"


def origin_in_sweep(run: Path) -> dict[str, Any]:
    """What a sweep keeps of where a run comes from."""
    results = json.loads((run / "results.json").read_text())
    return {key: results[key] for key in (*ORIGIN, "training", "split", "config_digest", "scoring", "dtype")}


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


def test_numbers_are_read_at_a_glance() -> None:
    assert str(Cell(82541.2, (73279.3, 93668.2))) == "82540 (73300–93700)"
    assert str(Cell(0.00018, (0.00017, 0.00021))) == "0.00018 (0.00017–0.00021)"
    assert str(Cell(1783.0)) == "1783"
    assert str(Cell(None)) == ""


def test_nothing_is_fetched(page: str) -> None:
    """A page that is mailed to somebody opens on a plane."""
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|"http://www.w3.org[^"]*"', "", page).replace("&lt;", "")


def test_names_are_text_and_figures_are_there(page: str) -> None:
    assert "a&lt;b&gt;&amp;c" in page and "a<b>" not in page
    assert page.count("<svg") == 4, "learning curve, predictions, ablations, tags"
    assert "The paper, on its own rows" in page and "<td>Tag-LLaMA-7B</td>" in page
    assert (
        "<th>mse in the paper</th>" in page and "<code>tagllm" in page and "`" not in re.sub("<pre>.*?</pre>", "", page)
    )
    assert "without &lt;S&gt;" in page
    assert page.count('<tr class="first"><td>tag</td>') == page.count('<tr class="first"><td>as learned</td>') == 1


def test_markdown_has_the_same_numbers(run: Path, page: str) -> None:
    text = (run.parent / "out" / "report.md").read_text()
    assert "| without \\<S> |" in text and "; \\<QED>, \\<S>. `tagllm" in text, (
        "Markdown would take names for tags of HTML"
    )
    cells = re.findall(r"<td[^>]*>([0-9.e-]+)(?:<small>([^<]+)</small>)?</td>", page)
    assert len(cells) > 50 and any(interval for _, interval in cells)
    for value, interval in cells:
        assert re.search(rf"\| (\*\*)?{re.escape(value + (f' ({interval})' if interval else ''))}(\*\*)? \|", text)


def test_the_json_has_all_results_and_where_they_come_from(run: Path, page: str) -> None:
    document = json.loads((run.parent / "out" / "report.json").read_text())
    (section,) = document["sections"]
    curve = section.pop("loss_on_validation")
    assert section == json.loads((run / "results.json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert curve == {str(line["step"]): line["valid/loss_refitted"] for line in log if "valid/loss_refitted" in line}
    assert all(f"{step}: {digits(loss, 4)}" in page for step, loss in curve.items())
    assert {"command", "commit", "hardware", "versions", "date"} <= set(document) & set(section)
    assert set(section["baseline_intervals"]) == set(section["baselines"])
    assert section["dtype"] == "float32" and "float32" in page
    assert section["training"]["seconds"] > 0 and section["training"]["command"].startswith("tagllm train")


def test_a_sweep_is_a_table_and_a_figure(run: Path, tmp_path: Path) -> None:
    """With the baselines of its first combination beside it, over the seeds that have them."""
    for name in ("length=1_seed=0", "length=2_seed=0", "length=2_seed=1"):
        shutil.copytree(run, tmp_path / "lengths" / name)
    first, second = (json.loads((run / "results.json").read_text()) for _ in range(2))
    first_mean = first["baselines"]["predict_mean"]["mse"]
    second["baselines"]["predict_mean"]["mse"] = first_mean + 0.02
    del second["baselines"]["ridge_last"]
    (tmp_path / "lengths" / "length=2_seed=1" / "results.json").write_text(json.dumps(second))
    mse = {"length=1": [0.5, None], "length=2": [0.2, 0.05]}
    about = origin_in_sweep(run)
    combinations = [
        {
            "shown": {"length": n}, "runs": n,
            "metrics": {"mse": mse[f"length={n}"], "mae": [first["metrics"]["mae"], None]},
            "tried": {"1e-2": 0.7, "3e-2": 0.6},
            "folders": [f"length={n}_seed={seed}" for seed in range(n)], "origins": [about] * n, "notes": [],
        }
        for n in (2, 1)
    ]  # fmt: skip
    document = {"run": "lengths", "seeds": [0, 1], "tuned": "optim.tag_lr", "combinations": combinations, **about}
    (tmp_path / "lengths" / "sweep_length.json").write_text(json.dumps(document))
    result = RUNNER.invoke(app, ["report", str(tmp_path / "lengths"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| length=1 | 0.5 |" in text and "0.2 (0.15–0.25)" in text
    section = json.loads((tmp_path / "out" / "report.json").read_text())["sections"][0]
    curves = section["loss_on_validation"]
    assert {label: len(of_runs) for label, of_runs in curves.items()} == {"length=1": 1, "length=2": 2}
    others = section["others"]
    assert others["predict_mean"]["mse"] == pytest.approx([first_mean + 0.01, 0.01 * 12.706], rel=1e-3)
    assert others["ridge_last"]["mse"] == [first["baselines"]["ridge_last"]["mse"], None]
    low, high = first["baseline_intervals"]["ridge_last"]["mse"]
    assert f"({digits(low, 3)}–{digits(high, 3)})" in text.split("## ")[1], "over the rows, where seeds tell nothing"
    mae = [digits(end, 3) for end in first["intervals"]["mae"]]
    assert f"{digits(first['metrics']['mae'], 4)} ({mae[0]}–{mae[1]})" in text.split("## ")[1]
    assert "length=2_seed=1: `tagllm eval" in (tmp_path / "out" / "report.html").read_text()
    assert f"| predict_mean | {first_mean + 0.01:.4g} (" in text
    assert "of length=2, over the seeds that have them" in text
    assert "loss on validation by optim.tag_lr: 1e-2: 0.7, 3e-2: 0.6" in text
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<svg") == 6, "two more than the run alone: curves of all runs, and what came of them"
    assert html.count("learning curves") == 1 and html.count("loss on validation, refitted") == 1
    assert all(html.count(f"config of length={n}") == 1 for n in (1, 2))


def test_a_baseline_that_knows_nothing_of_the_seeds_has_its_interval_over_the_rows(run: Path, tmp_path: Path) -> None:
    """Runs that learn a function tag ask the frozen model of the rest: what their baselines differ by is rounding."""
    results = json.loads((run / "results.json").read_text()) | {"learned": ["QED"]}
    mse, interval = results["baselines"]["ridge_mean"]["mse"], results["baseline_intervals"]["ridge_mean"]["mse"]
    for seed in range(2):
        shutil.copytree(run, tmp_path / "seeds" / f"seed={seed}")
        results["baselines"]["ridge_mean"]["mse"] = mse * (1 + seed / 100)
        (tmp_path / "seeds" / f"seed={seed}" / "results.json").write_text(json.dumps(results))
    about = origin_in_sweep(run)
    combination = {
        "shown": {}, "runs": 2, "metrics": {"mse": [0.2, 0.05]}, "tried": {}, "folders": ["seed=0", "seed=1"],
        "origins": [about] * 2, "notes": [],
    }  # fmt: skip
    document = {"run": "seeds", "seeds": [0, 1], "tuned": None, "combinations": [combination], **about}
    (tmp_path / "seeds" / "sweep.json").write_text(json.dumps(document))
    assert RUNNER.invoke(app, ["report", str(tmp_path / "seeds"), "--out", str(tmp_path / "out")]).exit_code == 0
    text = (tmp_path / "out" / "report.md").read_text().split("## ")[1]
    low, high = (digits(end, 3) for end in interval)
    assert f"| ridge_mean | {digits(mse * 1.005, 4)} ({low}–{high})" in text.replace("**", "")
    assert "| tag | 0.2 (0.15–0.25)" in text.replace("**", "")


def test_a_variant_that_is_called_as_a_control_keeps_its_own_figures(run: Path, tmp_path: Path) -> None:
    """And so does the control."""
    results = json.loads((run / "results.json").read_text())
    about, mean = origin_in_sweep(run), results["baselines"]["predict_mean"]["mse"]
    combinations = [
        {
            "shown": {"variant": name}, "runs": 1, "metrics": {"mse": [mse, None]}, "tried": {}, "folders": folders,
            "origins": [about for _ in folders], "notes": [],
        }
        for name, mse, folders in (("full", 0.25, ["a"]), ("predict_mean", 0.125, []))
    ]  # fmt: skip
    shutil.copytree(run, tmp_path / "variants" / "a")
    document = {"run": "variants", "seeds": [0], "tuned": None, "combinations": combinations, **about}
    (tmp_path / "variants" / "sweep.json").write_text(json.dumps(document))
    assert RUNNER.invoke(app, ["report", str(tmp_path / "variants"), "--out", str(tmp_path / "out")]).exit_code == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"\| predict_mean \| (\*\*)?0\.125", text)
    assert f"| predict_mean, of full | {digits(mean, 4)} (" in text


def test_results_without_their_config_are_shown(run: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    shutil.copy(run / "results.json", tmp_path / "kept")
    result = RUNNER.invoke(app, ["report", str(tmp_path / "kept"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr


def test_a_run_its_sweeps_and_what_was_composed_are_all_shown(run: Path, tmp_path: Path) -> None:
    """README's commands leave them in one folder."""
    shutil.copytree(run, tmp_path / "all")
    about = {key: json.loads((run / "results.json").read_text())[key] for key in ORIGIN}
    document = {"run": "all", "seeds": [0], "tuned": None, "combinations": [], **about}
    for name in ("sweep.json", "sweep_tags.length.json"):
        (tmp_path / "all" / name).write_text(json.dumps(document))
    write_case(tmp_path / "all" / "EN-FR", 30.0)
    write_case(tmp_path / "all" / "seed=0" / "EN-FR", 30.0)
    assert [type(found).__name__ for found in collect(tmp_path / "all")] == ["Run", *["Swept"] * 2, *["Composed"] * 2]


def test_the_paper_stands_beside_the_same_quantity_alone() -> None:
    assert published_of(["DrugCombination"], {"oneil"}) is None
    paper = published_of(["DrugCombination"], {"drugcomb-css"})
    assert paper is not None and paper.metric == "mae"
    ours = ["tag", "LoRA + head", "no domain tag", "tags.DrugCombination.length=10", "tags.length=5", "boosting"]
    assert paper.beside("optim.tag_lr=0.01, tags.length=5") is None, "more than the length is another"
    assert [paper.beside(label) for label in ours] == [12.21, 12.53, 12.39, 12.21, 12.75, None]
    assert published_of(["BindingAffinity"], {"davis"}) is None, "kinases alone are another task"


def write_case(folder: Path, score: float) -> None:
    """What compose leaves of a case, its tags with this score."""
    about = {**dict.fromkeys(("command", "commit", "hardware", "date"), "x"), "versions": {"tagllm": "1"}}
    folder.mkdir(parents=True)
    results = {
        "run": folder.name, "split": "test", "rows": 2, "prompt": "tags",
        "metrics": {"chrf++": score, "in_language": 1.0},
        "intervals": {"chrf++": [score - 1, score + 1]}, "baselines": {}, "controls": {"in text": {"chrf++": 25.0}},
        "control_intervals": {"in text": {"chrf++": [24.0, 26.0]}}, "learned": ["Translate"],
        "backbone": {"name": "tiny"}, "dtype": "float32", "format": 2, "config_digest": "0" * 64,
        "libraries": {}, **about,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text("evaluation: {beams: 1}\nlibraries: [one]\n")
    answers = [{"source": p, "prompt": "cat", "reference": "chat", "generated": f"<{p}>"} for p in ("tags", "in text")]
    (folder / "generated.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def test_compose_with_several_seeds_is_a_table_of_means(tmp_path: Path) -> None:
    for seed, score in enumerate((29.0, 31.0)):
        write_case(tmp_path / "composed" / f"seed={seed}" / "EN-FR", score)
    write_case(tmp_path / "composed" / "seed=0" / "FR-EN", 20.0)
    result = RUNNER.invoke(app, ["report", str(tmp_path / "composed"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| EN-FR | **30 (17.3–42.7)** | 25 (24–26) |" in text, "half of the interval: 12.706 standard errors of 1"
    assert "| FR-EN | 20 (19–21) | **25 (24–26)** |" in text, "bootstrapped, of the only seed"
    assert "Mean over 2 seeds" in text and "in_language:\n\n| case | tags |" in text
    sections = json.loads((tmp_path / "out" / "report.json").read_text())["sections"]
    case = sections[0]["cases"]["EN-FR"]
    assert case["mean"]["tags"] == {"chrf++": 30.0, "in_language": 1.0}
    assert [(seed["metrics"]["tags"]["chrf++"], seed["command"]) for seed in case["each"]] == [(29.0, "x"), (31.0, "x")]
    assert "Of fewer seeds: FR-EN (1)." in text
    assert [section["run"] for section in sections] == ["composed", "EN-FR", "FR-EN"]


def test_seeds_that_were_asked_otherwise_have_no_mean(tmp_path: Path) -> None:
    for seed in range(2):
        write_case(tmp_path / "composed" / f"seed={seed}" / "EN-FR", 29.0)
    config = tmp_path / "composed" / "seed=1" / "EN-FR" / "config.yaml"
    config.write_text("evaluation: {beams: 4}\nlibraries: [another]\n")
    file = config.with_name("results.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split": "valid"}))
    result = RUNNER.invoke(app, ["report", str(tmp_path / "composed"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "EN-FR was not asked the same" in result.stderr
    assert "split test and valid" in result.stderr and "evaluation.beams 1 and 4" in result.stderr
    assert "libraries" not in result.stderr, "these are what differs between seeds"


def test_compose_is_a_table_of_cases_and_shows_what_was_written(tmp_path: Path) -> None:
    for name, score in (("EN-FR", 30.0), ("IT-FR unseen", 20.0)):
        write_case(tmp_path / "composed" / name, score)
    result = RUNNER.invoke(app, ["report", str(tmp_path / "composed"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| EN-FR | **30 (29–31)** | 25 (24–26) |" in text
    assert "| IT-FR unseen | 20 (19–21) | **25 (24–26)** |" in text
    assert "Tag-LLaMA-7B | **40.5** |" in text, "what the paper has for this pair"
    assert "&lt;in text&gt;" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("missing", ["scoring", "intervals"])
def test_results_of_an_earlier_version_are_told(run: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "results.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != missing}))
    result = RUNNER.invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert f"{file}: has no {missing}, as an earlier tagllm wrote it." in result.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("metrics.jsonl", "is not JSON"), ("config.yaml", "is not YAML"), ("results.json", "is not JSON"),
        ("held_out.safetensors", "is not a safetensors file"),
    ],
)  # fmt: skip
def test_a_file_that_was_cut_off_is_told(run: Path, tmp_path: Path, name: str, told: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] if name != "config.yaml" else whole + b"\n- {")
    result = RUNNER.invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert f"{file}: cannot be used: it {told}" in result.stderr and result.stderr.count("\n") == 1


def test_a_run_without_results_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("results.json"))
    result = RUNNER.invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert f"Score it first: tagllm eval {tmp_path / 'run'}" in result.stderr
    result = RUNNER.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and f"it holds {tmp_path / 'run'}, name these" in result.stderr
    result = RUNNER.invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "nowhere: is no folder" in result.stderr


def test_results_on_rows_to_test_come_first(run: Path, tmp_path: Path) -> None:
    """Those of another split are shown where there are none; as they lie, also in runs that were scored in place."""
    scored, here = json.loads((run / "results.json").read_text()), tmp_path / "run"
    shutil.copytree(run, here)

    def write(folder: Path, split: str, rows: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(scored | {"split": split, "rows": rows}))

    def shown() -> list[int]:
        return [found.results["rows"] for found in collect(here) if isinstance(found, Run)]

    write(here / "valid", "valid", 1)
    assert shown() == [scored["rows"]]
    write(here, "valid", 2)
    assert shown() == [1], "what was written in place before is older"
    shutil.rmtree(here / "valid")
    assert shown() == [2]
    (here / "results.json").rename(tmp_path / "results.json")
    write(here / "train", "train", 3)
    assert shown() == [3]
    (here / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds no run"):
        collect(here)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser (Debian: chromium)")
def test_it_fits_a_phone(run: Path, page: str, tmp_path: Path) -> None:
    """In a real browser the page is no wider than a phone's screen (a window is 500 pixels at least, a frame may be
    less); tables scroll by themselves."""
    told = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe style="width: 390px; border: 0" onload="{told}" srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "page.html").write_text(f"<html><head><title></title></head><body>{frame}</body></html>")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    shown = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    (width,) = re.findall(r"<title>(\d+)</title>", shown)
    assert 300 < int(width) <= 390


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
    assert "alone" not in result.stdout
    library = TagLibrary.load(run / "library")
    alone = replace(library.tags["QED"], head=leaving_the_tag_out(HeadConfig(reads="both"), tiny.HIDDEN))
    library.add(alone).save(tmp_path / "library")
    told = RUNNER.invoke(app, ["inspect", str(tmp_path / "library")])
    assert "<QED>: its head answers from the fields alone" in told.stdout, told.stderr
    other = tiny.save_backbone(tmp_path / "other")
    tiny.backbone(seed=5).save_pretrained(other)
    refused = RUNNER.invoke(app, ["inspect", str(run / "library"), "--model", str(other)])
    assert refused.exit_code == 2 and "backbone" in refused.stderr


def test_the_projector_has_every_row_among_tokens(run: Path, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", str(run / "library"), "--projector", str(tmp_path / "projector")])
    assert result.exit_code == 0, result.stderr
    config = (tmp_path / "projector" / "projector_config.pbtxt").read_text()
    (tensors,) = re.findall(r'tensor_path: "(.*)"', config)
    (metadata,) = re.findall(r'metadata_path: "(.*)"', config)
    points = np.loadtxt(tmp_path / "projector" / tensors)
    header, *labels = (tmp_path / "projector" / metadata).read_text().splitlines()
    assert header.split("\t") == ["text", "tag", "kind"] and len(labels) == len(points)
    rows_PD = TagLibrary.load(run / "library").tags["QED"].rows_PD
    at = [i for i, label in enumerate(labels) if label.startswith("<QED>")]
    assert points[at] == pytest.approx(rows_PD.numpy(), rel=1e-4)
    assert sum(label.endswith("token") for label in labels) == tiny.VOCABULARY


def test_a_run_that_was_scored_otherwise_since_is_no_part_of_its_sweep(run: Path, tmp_path: Path) -> None:
    results, about = json.loads((run / "results.json").read_text()), origin_in_sweep(run)
    shutil.copytree(run, tmp_path / "sweep" / "seed=0")
    one = {
        "shown": {}, "runs": 1, "metrics": {"mse": [0.5, None]}, "tried": {}, "folders": ["seed=0"],
        "origins": [about], "notes": ["told"],
    }  # fmt: skip
    document = {"run": "sweep", "seeds": [0], "tuned": None, "combinations": [one], **about}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(document))
    command = ["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "out")]
    assert RUNNER.invoke(app, command).exit_code == 0
    assert "tag, 1 of 1: told" in (tmp_path / "out" / "report.md").read_text()
    quantised = {"scoring": results["scoring"] | {"backbone.quantize": "nf4"}}
    for anew, what in (({"split": "valid"}, "split valid and not test"), (quantised, "quantize nf4 and not none")):
        (tmp_path / "sweep/seed=0/results.json").write_text(json.dumps(results | anew))
        told = RUNNER.invoke(app, command)
        assert told.exit_code == 2 and "scored anew" in told.stderr and what in told.stderr


def test_ends_of_lines_that_json_does_not_know_are_text(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "texts")
    answer = {"source": "p", "prompt": "a\u2028b", "given": "a", "reference": "c\x85", "generated": "d"}
    (tmp_path / "texts/generated.jsonl").write_text(json.dumps(answer, ensure_ascii=False) + "\n")
    (found,) = collect(tmp_path / "texts")
    assert found.answers == [answer]


def test_how_a_rate_was_chosen_is_told() -> None:
    assert _rate({"lr": 3e-4, "lr_at_edge": False, "tried": {}}) == "lr 0.0003 as given"
    told = _rate({"lr": 1e-3, "lr_at_edge": True, "tried": {"0.001": 0.25, "0.003": 0.5}})
    assert told == "lr 0.001 (loss on validation: 0.001 0.25, 0.003 0.5; the best is at the edge)"


def test_a_folder_of_runs_is_a_table_in_the_terminal(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tagllm.report.terminal", str(run.parent)], capture_output=True, text=True, check=True
    )
    results = json.loads((run / "results.json").read_text())
    (row,) = [line for line in done.stdout.splitlines() if run.name in line and " mse " in line]
    assert f"{digits(results['metrics']['mse'], 4)}" in row and f" {results['rows']} " in row
    assert f"predict_mean {digits(results['baselines']['predict_mean']['mse'], 4)}" in done.stdout
