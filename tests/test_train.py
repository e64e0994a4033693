"""`tagllm train`: what it leaves in its folder, how it ends, goes on and refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tagllm.tags import Tag, TagLibrary
from tagllm.train.signals import EXIT_STOPPED, StopAsked
from tagllm.train.validation import Validation
from tests import tiny
from tests.commands import Run, config, fails


def test_a_run_that_was_stopped_behind_its_last_step_ends_once(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last fit may take minutes: it is done again after a stop in it, and never after it was done."""
    file, fits = config(folder, "late"), Validation.probes

    def stopped(*_: Any) -> None:
        raise StopAsked

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "probes", stopped)
        assert run("train", file).exit_code == EXIT_STOPPED
    assert not (folder / "runs/late/library").exists()
    for times in (1, 0):
        done = list[int]()
        monkeypatch.setattr(Validation, "probes", lambda *passes, done=done: done.append(1) or fits(*passes))
        assert run("train", file).exit_code == 0
        assert len(done) == times
    assert (folder / "runs/late/library").exists()


def test_the_last_steps_are_saved_before_the_last_fit(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Validation, "probes", failing)
    assert isinstance(run("train", config(folder, "unfitted")).exception, MemoryError)
    assert [path.name for path in (folder / "runs/unfitted/checkpoints").glob("step-*")] == ["step-00000003"]


@pytest.mark.parametrize("cut", ["held_out", "seen_by_heads"])
def test_an_evaluation_that_a_stop_cut_off_is_made_by_the_next_process(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """In either of its passes: no score is left out, and the best state is the same one."""

    def stopped(*_: Any) -> None:
        raise StopAsked

    assert run("train", config(folder, "unstopped")).exit_code == 0
    file = config(folder, f"cut-{cut}")
    with monkeypatch.context() as patch:
        patch.setattr(Validation, cut, stopped)
        assert run("train", file).exit_code == EXIT_STOPPED
    assert run("train", file).exit_code == 0
    (found, progress), (expected, its) = (_scores(folder / "runs" / name) for name in (f"cut-{cut}", "unstopped"))
    assert found == expected and len(found) == 2
    assert progress == its


def _scores(run: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """What was logged of held-out rows, and the progress in the newest checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [{k: v for k, v in line.items() if k == "step" or k.startswith("valid/")} for line in lines]
    newest = max((run / "checkpoints").glob("step-*"))
    return [one for one in scores if "valid/loss" in one], json.loads((newest / "progress.json").read_text())


@pytest.mark.parametrize("mask", ["causal", "block"])
def test_groups_are_shared_and_remembered(run: Run, folder: Path, mask: str) -> None:
    """Causal: all up to the second field is shared; block: the span alone. The second epoch computes next to nothing,
    and the losses are those of the plain full backward."""
    base = config(folder, "sites", tags={"D": {"length": 2}}, data__template="A <D> {smiles}", data__target=[])
    assert run("train", base).exit_code == 0
    template = "The site <D> {name} {name} {name} {name} binds <D> {smiles} by <W>"
    tags = {"D": {"load": "runs/sites/library"}, "W": {"kind": "function", "length": 2, "head": {"reads": "both"}}}
    losses = {}
    for prefix in ("frozen", "full"):
        file = config(folder, f"{mask}-{prefix}", tags=tags, data__template=template, prefix=prefix, mask=mask, optim={
            "epochs": 2, "rows_per_step": 8, "rows_per_micro_batch": 8,
        })  # fmt: skip
        values = yaml.safe_load(file.read_text())
        values["data"]["sources"][0] |= {"group_by": "name", "rows_per_group": 4, "split": {"by": "smiles"}}
        file.write_text(yaml.safe_dump(values))
        bare = run("check", file, "data.sources[0].template=<D> {name} binds <D> {smiles} by <W>")
        assert ("begins with <D>" in bare.stdout) == (mask == "block"), bare.output
        assert "note" not in run("check", file).stdout, "there is text in front of each"
        result = run("train", file)
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in (folder / f"runs/{mask}-{prefix}/metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "train/loss" in line]
        losses[prefix] = [line["train/loss"] for line in steps]
        if prefix == "frozen":
            assert steps[0]["speed/prefix_sharing_ratio"] > (0.05 if mask == "block" else 0.4)
            assert steps[0]["speed/flops_ratio"] > 2 * steps[-1]["speed/flops_ratio"]
            assert steps[-1]["speed/prefix_hit_ratio"] > 0.3
    assert losses["frozen"] == pytest.approx(losses["full"], rel=2e-4)
    library = TagLibrary.load(folder / f"runs/{mask}-frozen/library")
    assert library.tags["W"].about["mask"] == mask
    assert library.tags["W"].about["dtype"] == "fp32", "and in its dtype, whatever is fastest just now"
    other = TagLibrary(library.backbone)
    for tag in library.tags.values():
        about = tag.about | {"mask": "causal"}
        other = other.add(Tag(tag.name, tag.kind, tag.rows_PD, tag.head, about))
    other.save(folder / f"causal-{mask}")
    answers = []
    for source in (f"runs/{mask}-frozen/library", f"causal-{mask}"):
        output = folder / f"{mask}-{Path(source).name}.csv"
        assert run("predict", source, "rows.csv", output).exit_code == 0
        answers.append([row["W"] for row in csv.DictReader(output.open())])
    assert (answers[0] == answers[1]) == (mask == "causal"), "predictions are made under the mask of training"


def test_libraries_that_do_not_fit(run: Run, folder: Path, tmp_path: Path) -> None:
    first = config(folder, "lib", tags={"D": {"length": 2}}, data__template="A <D> {smiles}", data__target=[])
    assert run("train", first).exit_code == 0
    library = TagLibrary.load(folder / "runs/lib/library")
    other = library.backbone._replace(fingerprint="0" * 64)
    TagLibrary(other, library.tags).save(tmp_path / "other")
    tags = {"D": {"load": str(tmp_path / "other")}, "W": {"kind": "function", "head": {}, "length": 2}}
    file = config(folder, "fit", tags=tags, data__template="A <D> {smiles} is <W>")
    fails(run("train", file), "000000000000", library.backbone.fingerprint[:12])
    shutil.copytree(folder / "runs/lib/library", tmp_path / "damaged")
    tensors = tmp_path / "damaged/tags.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    fails(run("train", file, f"tags.D.load={tmp_path / 'damaged'}"), "sha256")
    fails(run("train", file, f"tags.D.load={tmp_path}"), "not a tag library")


def test_a_folder_holds_one_run(run: Run, folder: Path, tmp_path: Path) -> None:
    file = config(folder, "one")
    assert run("train", file).exit_code == 0
    before = (folder / "runs/one/library/tags.safetensors").read_bytes()
    fails(run("train", file, "optim.tag_lr=0.5"), "already holds another run", "optim.tag_lr")
    again = run("train", file)
    assert again.exit_code == 0 and "finished before" in again.output and "give another output" in again.output
    assert (folder / "runs/one/library/tags.safetensors").read_bytes() == before
    shutil.rmtree(folder / "runs/one/library")
    assert run("train", file).exit_code == 0
    assert (folder / "runs/one/library/tags.safetensors").read_bytes() == before, "made anew from the last checkpoint"
    (tmp_path / "thesis.txt").write_text("mine")
    fails(run("train", file, f"output={tmp_path}"), "not empty")
    for name, is_taken in ((".git", True), (".tmp-config.yaml", False)):  # the second of a start that was cut off
        output = tmp_path / f"with {name}"
        output.mkdir()
        (output / name).write_text("")
        assert ("not empty" in run("train", file, f"output={output}").stderr) == is_taken
    fails(run("eval", tmp_path), "holds no run")
    fails(run("predict", tmp_path, folder / "rows.csv", folder / "p.csv"), "not a tag library")


def test_a_start_that_trains_nothing_changes_no_file(run: Run, folder: Path) -> None:
    """One of a finished run, and one that is refused: whoever reads the folder learns what trained it."""
    rows = folder / "mine.csv"
    shutil.copy(folder / "rows.csv", rows)
    file = config(folder, "kept", data__path=str(rows))
    assert run("train", file).exit_code == 0

    def files() -> dict[str, int]:
        paths = (path for path in (folder / "runs/kept").rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.stat().st_mtime_ns for path in paths}

    before = files()
    assert run("train", file).exit_code == 0
    assert files() == before
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-5]))
    fails(run("train", file), "a run goes on only with the same data")
    assert files() == before


def test_full_backward_and_no_validation_split(run: Run, folder: Path) -> None:
    """The reference path gives the same tags, and a run without validation rows ends in its last state."""
    split = {"by": "smiles", "valid": 0.0, "test": 0.2}
    tensors = []
    for prefix in ("frozen", "full"):
        file = config(folder, f"prefix_{prefix}", prefix=prefix, data__split=split)
        result = run("train", file)
        assert result.exit_code == 0, result.stderr
        library = TagLibrary.load(folder / f"runs/prefix_{prefix}/library")
        tensors.append(library.tags["W"].rows_PD)
    assert tiny.relative_error(tensors[0], tensors[1]) < 1e-4


def test_early_stop_keeps_the_best(run: Run, folder: Path) -> None:
    """By the loss with the head in closed form, unless the trained one is clearly better."""
    evaluation = {"every_steps": 1, "patience": 2}
    file = config(folder, "patience", evaluation=evaluation, optim__steps=60, optim__tag_lr=3.0, optim__head_lr=3.0)
    assert run("train", file, "optim.schedule=constant").exit_code == 0
    lines = [json.loads(line) for line in (folder / "runs/patience/metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "valid/loss" in line]
    losses = {line["step"]: line["valid/loss_refitted"] for line in scored}
    assert all(line["valid/loss_refitted"] in (line["valid/loss"], line["refit/W_after"]) for line in scored)
    assert len(losses) < 60
    best = min(losses, key=lambda step: losses[step])
    assert TagLibrary.load(folder / "runs/patience/library").tags["W"].about["best_step"] == best == max(losses) - 2


def test_tensorboard_has_what_the_jsonl_has(run: Run, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("train", config(folder, "board")).exit_code == 0
    events = EventAccumulator(str(folder / "runs/board/tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (folder / "runs/board/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert {
        "valid/loss", "train/gradient_norm", "train/tag_lr", "train/skipped_steps", "tags/W/gradient_norm",
        "tags/W/row_norm", "speed/rows_per_second", "speed/prefix_hit_ratio", "speed/live_tokens_per_second",
    } <= set(events.Tags()["scalars"])  # fmt: skip


@pytest.mark.parametrize("cell", ["nan", "inf", "heavy", ""])
def test_bad_rows_are_named_or_skipped(run: Run, folder: Path, cell: str) -> None:
    rows = (folder / "rows.csv").read_text().splitlines()
    rows[7] = f"CCO,{cell},a,b"
    (folder / "bad.csv").write_text("\n".join(rows) + "\n")
    split = {"by": "smiles", "valid": 0.2, "test": 0.0}
    file = config(folder, "bad", data__path=str(folder / "bad.csv"), data__split=split)
    shutil.rmtree(folder / "runs/bad", ignore_errors=True)
    fails(run("train", file), "bad.csv, line 8", "weight is", "on_bad_row=skip")
    assert run("train", file, "data.on_bad_row=skip", "output=runs/bad_skip_" + cell).exit_code == 0
    listed = [json.loads(line) for line in (folder / f"runs/bad_skip_{cell}/bad_rows.jsonl").read_text().splitlines()]
    assert [(row["line"], Path(row["file"]).name) for row in listed] == [(8, "bad.csv")]
