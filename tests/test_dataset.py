"""Tokenised rows as they are kept: under what they depend on, whole, and by several processes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tagllm import files
from tagllm.config import DataConfig, SourceConfig
from tagllm.data.dataset import Data, Prompts, tokenise
from tagllm.data.encode import Encoder, Example
from tagllm.data.layout import TagLayout
from tagllm.errors import UserError
from tagllm.template import parse_template
from tagllm.train.signals import EXIT_STOPPED, StopAsked
from tagllm.train.validation import Validation
from tests import tiny
from tests.commands import Run, config, fails

KINDS = {"A": "domain", "B": "domain", "F": "function"}
TEMPLATE = "<A> {a} <B> {b} <F> {output}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny.save_backbone(tmp_path_factory.mktemp("backbone")))


def layout(*order: str) -> TagLayout:
    return TagLayout.of(tiny.VOCABULARY, {name: KINDS[name] for name in order}, dict.fromkeys(order, 3), ["F"], {})


def prepared(tmp_path: Path, tokenizer: Any, of: TagLayout, **changes: Any) -> Data:
    file = tmp_path / "rows.csv"
    if not file.exists():
        file.write_text("a,b,output\n" + "".join(f"x{i},y{i},z{i}\n" for i in range(40)))
    source = {"path": str(file), "template": TEMPLATE, "split": {"valid": 0.2, "test": 0.2}}
    given = DataConfig.model_validate({"sources": [source], **changes})
    return tokenise(given, [parse_template(TEMPLATE, KINDS)], Prompts(of, tokenizer, 100), tmp_path / "cache")


def test_tags_in_another_order_are_other_rows(tmp_path: Path, tokenizer: Any) -> None:
    """Ids follow the order of the config; frozen tags used to trade places where rows were kept already."""
    for order in (("A", "B", "F"), ("B", "A", "F")):
        of = layout(*order)
        ids = prepared(tmp_path, tokenizer, of).splits["train"][0][0].ids
        assert set(of.ids("A")) | set(of.ids("B")) <= set(ids.tolist())
        first = next(i for i in ids.tolist() if i >= tiny.VOCABULARY)
        assert first == of.ids("A")[0], "the prompt begins with <A>"


def test_what_is_read_back_is_what_was_encoded(tmp_path: Path, tokenizer: Any) -> None:
    """Any row of any batch of the file, and from behind; types too."""
    rows = [{"a": f"x{i}", "b": "y" * (i % 9 + 1), "output": f"z{i}"} for i in range(2300)]
    (tmp_path / "rows.csv").write_text("a,b,output\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    data = prepared(tmp_path, tokenizer, layout("A", "B", "F"))
    (examples,) = data.splits["train"]
    config = SourceConfig(path=str(tmp_path / "rows.csv"), template=TEMPLATE)
    encoder = Encoder(parse_template(TEMPLATE, KINDS), config, layout("A", "B", "F"), tokenizer, 100)
    for at in (0, 999, 1000, len(examples) - 1, -1):
        (wanted,) = encoder.encode([rows[examples.row_numbers()[at]]])
        found = examples[at]
        assert isinstance(wanted, Example)
        for part in Example._fields[:-1]:
            one, other = getattr(found, part), getattr(wanted, part)
            assert np.array_equal(one, other) and getattr(one, "dtype", int) == getattr(other, "dtype", int), part
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_two_that_write_the_same_rows_at_once_leave_them_whole(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, nested = files.write_durably, list[int]()

    def beside_another(path: Path, content: bytes) -> None:
        written(path, content)
        if not nested:
            nested.append(1)
            prepared(tmp_path, tokenizer, layout("A", "B", "F"))

    monkeypatch.setattr(files, "write_durably", beside_another)
    (tmp_path / "cache").mkdir()
    data = prepared(tmp_path, tokenizer, layout("A", "B", "F"))
    assert nested and sum(len(data.splits[split][0]) for split in data.splits) == 40
    assert not list((tmp_path / "cache").glob("*tmp*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_durably", full)
    with pytest.raises(UserError, match="cannot be written.*No space left.*Make room"):
        prepared(tmp_path, tokenizer, layout("A", "B", "F"))
    assert not list((tmp_path / "cache").glob("examples-*"))


def test_a_split_of_bad_rows_alone_is_refused(run: Run, folder: Path) -> None:
    lines = [f"m{i},{'>5' if i % 2 else '>7'}\n" for i in range(40)]
    (folder / "bad.csv").write_text("smiles,weight\n" + "".join(lines))
    file = config(folder, "bad", data__path=str(folder / "bad.csv"), data__on_bad_row="skip")
    fails(run("train", file), "data.sources.0", "no row gives an example", "bad.csv, line ", "weight is '>")


def test_other_targets_behind_the_same_keys_are_other_data(run: Run, folder: Path) -> None:
    table = folder / "targets.csv"
    rows = [f"m{i},{i / 7}" for i in range(60)]
    table.write_text("\n".join(["smiles,weight", *rows]) + "\n")
    assert run("train", config(folder, "targets", data__path=str(table))).exit_code == 0
    table.write_text("\n".join(["smiles,weight", *(f"m{i},{i / 3}" for i in range(60))]) + "\n")
    for more in ([], ["engine.timeout_s=60"]):  # which asks for no other rows
        fails(run("eval", "runs/targets", *more), "splits.json", "the data changed since training")


def test_a_run_does_not_go_on_with_other_frozen_tags(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise StopAsked

    domain = {"SMILES": {"kind": "domain", "length": 2}}
    stage = {"tags": domain, "data__template": "<SMILES> {smiles}", "data__target": []}
    assert run("train", config(folder, "one", **stage)).exit_code == 0
    tags = {"SMILES": {"load": "runs/one/library"}, "W": {"kind": "function", "length": 2, "head": {}}}
    two = config(folder, "two", tags=tags, data__template="<SMILES> {smiles} <W>")
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "probes", stopped)
        assert run("train", two).exit_code == EXIT_STOPPED
    assert run("train", config(folder, "one", **stage), "output=runs/other", "seed=1").exit_code == 0
    (folder / "runs/one").rename(folder / "runs/first")
    (folder / "runs/other").rename(folder / "runs/one")
    fails(run("train", two), "loaded tags", "goes on only with the same")
    (folder / "runs/one").rename(folder / "runs/other")
    (folder / "runs/first").rename(folder / "runs/one")
    assert run("train", two).exit_code == 0


def test_what_is_not_asked_whole_is_told(run: Run, folder: Path) -> None:
    rows = [f"{'C' * (60 if i < 3 else 5)}{i},{i}" for i in range(40)] + ["CCO,heavy"]
    (folder / "told.csv").write_text("\n".join(["smiles,weight", *rows]) + "\n")
    changes = {"data__path": str(folder / "told.csv"), "data__split": {"valid": 0.1, "test": 0}}
    file = config(folder, "told", **changes, data__max_characters={"smiles": 61})
    told = run("train", file, "data.on_bad_row=skip", "data.max_tokens=48").stderr
    assert "1 rows cannot be used (the run's bad_rows.jsonl has all), the first " in told
    assert "told.csv): of 41 rows 3 cut to the tokens there is room for" in told


def test_fields_that_spell_a_missing_value_are_told(tmp_path: Path, tokenizer: Any) -> None:
    """In text files alone: their rows are trained on, with that text in the prompt."""
    rows = [f"{'NA' if i in (7, 9) else f'x{i}'},y{i},NA" for i in range(40)] + ["NAN,null,z", "x,None,z"]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,output", *rows]) + "\n")
    data = prepared(tmp_path, tokenizer, layout("A", "B", "F"))
    file = tmp_path / "rows.csv"
    a, b = (f"{at} rows (first: {file}, line {line})" for at, line in ((2, 9), (1, 43)))
    text = "which prompts have as text; leave a cell empty to leave its row out"
    assert data.told() == [f"data.sources.0 ({file}): a is NA in {a}, b is None in {b}, {text}"]
    assert sum(len(data.splits[split][0]) for split in data.splits) == 42
    (tmp_path / "rows.csv").unlink()
    assert not prepared(tmp_path, tokenizer, layout("A", "B", "F")).told()


def test_a_decimal_comma_is_named(run: Run, folder: Path) -> None:
    (folder / "comma.csv").write_text("smiles,weight\n" + "".join(f'm{i},"{i},5"\n' for i in range(20)))
    told = run("train", config(folder, "comma", data__path=str(folder / "comma.csv")))
    fails(told, "it must be a finite number; decimals stand behind a point")
