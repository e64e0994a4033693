"""Writing rows: every format, columns that come late, and values that one Arrow type does not hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tagllm import predict
from tagllm.data.readers import read_rows
from tagllm.data.row import Row
from tagllm.data.writers import open_writer
from tagllm.errors import UserError
from tests.commands import Run, config

LATE: list[dict[str, Any]] = [{"a": "x", "p": 1.5}, {"a": '\u00e4,\n\r"', "b": 3, "p": None}, {"p": 0.1}]


def written(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    with open_writer(path, columns) as writer:
        for row in rows:
            writer.write(row)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left"
    return [row.values for row in read_rows(path) if isinstance(row, Row)]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz"])
def test_a_column_that_comes_late_is_text_behind_the_others(name: str, tmp_path: Path) -> None:
    found = written(tmp_path / name, [*LATE[::2], {"a": "y", "b": 3, "p": None}], ["a", "p"])
    assert [list(row) for row in found] == [["a", "p", "b"]] * 3
    assert [list(row.values()) for row in found] == [["x", "1.5", ""], ["", "0.1", ""], ["y", "", "3"]]


def test_a_column_that_comes_late_in_parquet_and_jsonl(tmp_path: Path) -> None:
    whole = [{"a": None, "p": None, "b": None} | row for row in LATE]
    for name in "one", "two":
        (tmp_path / name).mkdir()
    assert written(tmp_path / "one" / "x.parquet", LATE, ["a", "p"]) == whole
    assert written(tmp_path / "two" / "x.jsonl.gz", LATE, ["a", "p"]) == LATE


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, "two", None, 2.5, True], ["1", "two", None, "2.5", "true"]),
        ([True, 1], ["true", "1"]),
        ([1.5, True], ["1.5", "true"]),
        ([1, 2**80], ["1", str(2**80)]),
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([False, None], [False, None]),
        (["x", ""], ["x", ""]),
    ],
)
def test_a_column_of_several_types_is_text_in_parquet(values: list[Any], expected: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with open_writer(path, ["v"]) as writer:
        for value in values:
            writer.write({"v": value})
    assert pq.read_table(path).to_pydict() == {"v": expected}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_of_uneven_objects_are_written(suffix: str, tmp_path: Path, run: Run, folder: Path) -> None:
    if not (folder / "runs/uneven/library").is_dir():
        assert run("train", config(folder, "uneven")).exit_code == 0
    lines: list[dict[str, Any]] = [{"smiles": "C", "id": 1}, {"smiles": "CCO", "id": "two", "note": "z"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = predict.Request([folder / "runs/uneven/library"])
    assert predict.predict_file(request, tmp_path / "in.jsonl", tmp_path / f"out.{suffix}") == (2, 0, 0, 0)
    first, second = (row.values for row in read_rows(tmp_path / f"out.{suffix}") if isinstance(row, Row))
    assert list(first) == ["smiles", "id", "note", "W", "tagllm_error"]
    assert (first["id"], second["id"], second["note"]) == ("1", "two", "z")
    assert float(first["W"]) != float(second["W"]) and not first["note"] and not first["tagllm_error"]
    (tmp_path / "late.jsonl").write_text('{"id": 1}\n' + "".join(json.dumps(line) + "\n" for line in lines))
    assert predict.predict_file(request, tmp_path / "late.jsonl", tmp_path / f"late.{suffix}") == (3, 1, 0, 0)
    (none, *_) = (row.values for row in read_rows(tmp_path / f"late.{suffix}") if isinstance(row, Row))
    assert none["tagllm_error"] == "smiles is empty; the template needs it"


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_value_that_holds_an_end_of_line_is_one_value(suffix: str, tmp_path: Path) -> None:
    rows = [{"a": "x\ry", "b": "1"}, {"a": "x\nz", "b": "2"}, {"a": "plain", "b": "3"}]
    assert written(tmp_path / f"ends.{suffix}", rows, ["a", "b"]) == rows


def test_parquet_is_not_packed_again(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"x.parquet.gz: cannot be written: .* Leave .gz out"),
        open_writer(tmp_path / "x.parquet.gz", ["a"]),
    ):
        pass
