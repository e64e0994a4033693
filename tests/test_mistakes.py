"""What is wrong with the machine, or with files of others: one line, and what was there stays."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tagllm import files
from tagllm.train.loop import Trainer
from tagllm.train.signals import EXIT_STOPPED, StopAsked
from tests.commands import Run, config, fails


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl"])
def test_a_disk_that_is_full_when_a_run_goes_on_is_told(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """And the run goes on once there is room."""
    made = config(folder, f"full-{file}", checkpoint={"every_steps": 1})

    def stopped(self: Trainer) -> None:
        raise StopAsked

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", stopped)
        assert run("train", made).exit_code == EXIT_STOPPED
    with monkeypatch.context() as patch:
        write = files.write_durably
        patch.setattr(files, "write_durably", lambda path, data: (full if file in path.name else write)(path, data))
        (line,) = fails(run("train", made), f"runs/full-{file}: cannot be written", "No space left", "Make room there")
        assert "start the same command again" in line
    assert run("train", made).exit_code == 0


def test_weights_that_were_cut_off_are_told(run: Run, folder: Path, tmp_path: Path) -> None:
    backbone = shutil.copytree(folder / "backbone", tmp_path / "cut")
    weights = (backbone / "model.safetensors").read_bytes()
    (backbone / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    made = config(folder, "cut", backbone__model=str(backbone))
    (line,) = fails(run("train", made), f"backbone.model is '{backbone}'; this folder cannot be loaded")
    assert "incomplete metadata" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"no_such_key": 1}}, ["sets zero_optimization.no_such_key to 1", "leave it out"]),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, ["sets zero_optimization.reduce_bucket_size to -1"]),
        ({"zero_optimisation": {}}, ["sets zero_optimisation, which DeepSpeed passes by; it reads zero_optimization."]),
        ({"bfloat16": {"enabled": True}}, ["sets bfloat16 to", "set backbone.dtype in the config instead"]),
        ({"amp": {"enabled": True}}, ["sets amp to {'enabled': True}; set backbone.dtype in the config instead"]),
        ({"torch_autocast": {"enabled": True}}, ["sets torch_autocast to", "set backbone.dtype in the config instead"]),
    ],
)
def test_deepspeed_settings_that_cannot_be_are_told(
    run: Run, folder: Path, settings: dict[str, Any], words: list[str]
) -> None:
    file = folder / "deepspeed.json"
    file.write_text(json.dumps(settings))
    made = config(folder, "deepspeed", engine={"deepspeed": str(file), "zero_stage": 0})
    (line,) = fails(run("train", made), *words)
    assert line.startswith(f"error: engine.deepspeed: {file} sets ")


def test_check_finds_what_would_end_a_run_later(run: Run, folder: Path) -> None:
    """A metric's model is needed behind the training, DeepSpeed's settings behind the loading of the backbone."""
    file = config(folder, "early", evaluation={"spbleu_model": "none.model"}, engine={"deepspeed": "none.json"})
    fails(run("check", file), "evaluation.spbleu_model is", "none.model", "engine.deepspeed: ", "none.json")


@pytest.mark.parametrize(
    ("name", "told"),
    [("./nowhere", "there is no such folder"), ("/nowhere/at/all", "there is no such folder"), (".", "config.json")],
)
def test_check_finds_that_a_folder_holds_no_model(run: Run, folder: Path, name: str, told: str) -> None:
    fails(run("check", config(folder, "no-model"), f"backbone.model={name}"), f"backbone.model is '{name}'", told)


def test_why_no_row_is_left_is_told(run: Run, folder: Path) -> None:
    """A table in another encoding, say, where a column that nobody asked for holds names."""
    (folder / "latin1.csv").write_bytes(b"smiles,weight,who\n" + b"CC,1.0,Ren\xe9\n" * 20)
    file = config(folder, "latin1", data__path=str(folder / "latin1.csv"), data__on_bad_row="skip")
    fails(run("train", file), "no rows for train", "latin1.csv, line 2: column 'who' is not valid UTF-8")


def test_a_log_that_is_gone_is_told(run: Run, folder: Path) -> None:
    assert run("train", config(folder, "no-log")).exit_code == 0
    (folder / "runs/no-log/metrics.jsonl").unlink()
    fails(run("eval", "runs/no-log"), "metrics.jsonl: cannot be used", "Restore it")


def test_results_that_cannot_be_written_are_told(run: Run, folder: Path) -> None:
    assert run("train", config(folder, "unwritable")).exit_code == 0
    (folder / "runs/unwritable/results.json").mkdir()
    fails(run("eval", "runs/unwritable"), "runs/unwritable: cannot be written")
