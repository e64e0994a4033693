"""A user's mistake under several ranks: every rank leaves with 2, one says why, none hangs."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launch import Workspace, finish, start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def complaints(stderr: list[str]) -> list[str]:
    return [line for text in stderr for line in text.splitlines() if line.startswith("error: ")]


def bad_sources(workspace: Workspace) -> str:
    path = workspace.folder / "bad.csv"
    rows = (workspace.folder / "rows.csv").read_text().splitlines()
    rows[7] = rows[7].replace(rows[7].split(",")[1], "heavy")
    path.write_text("\n".join(rows) + "\n")
    template = "The molecule is <SMILES> {smiles}. Its size is <Size>"
    return json.dumps([{"path": str(path), "template": template, "target": "size"}])


def test_rows_that_do_not_divide(workspace: Workspace) -> None:
    outcome = workspace.attempt(2, "indivisible", optim__rows_per_step=9)
    assert outcome.status == [2, 2], outcome.stderr
    (line,) = complaints(outcome.stderr)
    assert "optim.rows_per_step is 9" in line and "the number of ranks, 2. Start 1" in line and "8 or 10 rows" in line
    assert not (workspace.folder / "indivisible").exists()


def test_a_bad_row_ends_the_processes(workspace: Workspace) -> None:
    arguments = workspace.arguments("bad-row", data__sources=bad_sources(workspace))
    outcome = finish(start(["tagllm", *arguments], 2, workspace.folder / "cache"))
    assert outcome.status == [2, 2], outcome.stderr
    first, *_ = complaints(outcome.stderr)
    assert "bad.csv, line 8: size is 'heavy'" in first
    assert sum("line 8" in line for line in complaints(outcome.stderr)) == 1
    assert "Traceback" not in "".join(outcome.stderr)


def test_the_ranks_can_go_on_after_a_mistake(workspace: Workspace) -> None:
    """No collective is left half done."""
    outcome = workspace.attempt(2, "bad-row-again", data__sources=bad_sources(workspace))
    assert outcome.status == [2, 2], outcome.stderr
    workspace.train(2, "after-a-mistake", optim__steps=1)


def test_ranks_that_read_other_files_do_not_train(workspace: Workspace) -> None:
    """Each machine may have a copy of its own of the data."""
    folders = [workspace.folder / f"machine-{rank}" for rank in range(2)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        targets = "".join(f"{'C' * (at % 9 + 1)}{at},{at + 100 * rank}\n" for at in range(60))
        (folder / "own.csv").write_text("smiles,size\n" + targets)
    source = {"path": "own.csv", "template": "The molecule is <SMILES> {smiles}. Its size is <Size>", "target": "size"}
    arguments = workspace.arguments("apart", data__sources=json.dumps([source]))
    outcome = finish(start(["tagllm", *arguments], 2, workspace.folder / "cache", folders=folders))
    assert outcome.status == [2, 2], outcome.stderr
    (line,) = complaints(outcome.stderr)
    assert "data: rank 1 has" in line and "every rank reads its own files" in line


def test_ranks_that_read_other_files_do_not_predict(workspace: Workspace) -> None:
    run = workspace.train(1, "asked", optim__steps=1)
    folders = [workspace.folder / f"asking-{rank}" for rank in range(2)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        (folder / "new.csv").write_text("smiles\n" + "C\n" * (rank + 1))
    arguments = ["predict", str(run.path), "new.csv", "predicted.csv"]
    outcome = finish(start(["tagllm", *arguments], 2, workspace.folder / "cache", folders=folders))
    assert outcome.status == [2, 2], outcome.stderr
    (line,) = complaints(outcome.stderr)
    assert "new.csv: rank 1 has" in line and "every rank reads its own files" in line
    assert not any((folder / "predicted.csv").exists() for folder in folders)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("molecule\nC\n", "no column 'smiles'"),
        ("smiles,tagllm_error\nC,\n", "has a column 'tagllm_error'"),
        ('smiles\nC\n"CC\nC\nCCC\n', "a quote that is not closed"),
    ],
)
def test_a_mistake_of_predict_is_told_once(workspace: Workspace, text: str, words: str) -> None:
    """Before the ranks have met, and while they answer."""
    run = workspace.train(1, "mistaken", optim__steps=1)
    (workspace.folder / "mistaken.csv").write_text(text)
    arguments = ["predict", str(run.path), str(workspace.folder / "mistaken.csv"), str(workspace.folder / "never.csv")]
    outcome = finish(start(["tagllm", *arguments], 2, workspace.folder / "cache"))
    assert outcome.status == [2, 2], outcome.stderr
    (line,) = complaints(outcome.stderr)
    assert words in line and not (workspace.folder / "never.csv").exists()


@pytest.mark.parametrize(
    ("prompt", "library", "words"),
    [
        ("<Weight> {smiles} {output}", "library", '"Weight" is no tag'),
        ({"template": "{smiles}: {output}\n", "shots": 99}, "library", "shots is 99"),
        ("{smiles} {output}", "nowhere", "nowhere"),
    ],
)
def test_a_mistake_of_compose_is_told_once(workspace: Workspace, prompt: object, library: str, words: str) -> None:
    run = workspace.train(1, "composed-wrongly", optim__steps=1)
    source = {"path": str(workspace.folder / "rows.csv"), "output": "name"}
    case = {"source": source, "prompts": {"first": prompt}}
    outcome = workspace.attempt_to_compose(2, "never", [run.path / library], {"case": case}, engine={"zero_stage": 3})
    assert outcome.status == [2, 2], outcome.stderr
    (line,) = complaints(outcome.stderr)
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.sources.0.split.seed=1"], "was trained on"),
        (["data.sources.0.rows={test: 0}"], "rows"),
        (["damaged"], "tags.safetensors"),
    ],
)
def test_a_mistake_of_eval_is_told_once(workspace: Workspace, arguments: list[str], words: str) -> None:
    run = workspace.train(1, f"scored-wrongly-{arguments[0][:4]}", optim__steps=1)
    if arguments == ["damaged"]:
        (run.path / "library/tags.safetensors").write_bytes(b"x")
        arguments = []
    outcome = finish(start(["tagllm", "eval", str(run.path), *arguments], 2, workspace.folder / "cache"))
    assert outcome.status == [2, 2], outcome.stderr
    (line,) = complaints(outcome.stderr)
    assert words in line


def test_ranks_of_predict_read_settings_of_their_own(workspace: Workspace) -> None:
    run = workspace.train(1, "sharded-wrongly", optim__steps=1)
    missing = workspace.folder / "missing.json"
    arguments = ["predict", str(run.path), str(workspace.folder / "rows.csv"), str(workspace.folder / "never.csv")]
    outcome = finish(
        start(
            ["tagllm", *arguments, "engine.zero_stage=3", f"engine.deepspeed={missing}"], 2, workspace.folder / "cache"
        )
    )
    assert outcome.status == [2, 2] and "missing.json" in "".join(complaints(outcome.stderr)), outcome.stderr
