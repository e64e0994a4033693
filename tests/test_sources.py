"""Reading rows: every format, every way a row or a file can be broken, and the cached table."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tagllm.config import SourceConfig
from tagllm.data import readers, sources
from tagllm.data.readers import column_names, read_rows
from tagllm.data.row import BadRow, Row
from tagllm.data.sources import load_rows
from tagllm.errors import UserError

CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a data file; gzips it where the name says so."""

    def writer(name: str, content: str | bytes) -> Path:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    return writer


def source_of(**origin: Any) -> SourceConfig:
    return SourceConfig.model_validate({"template": "{a}", **origin})


def loaded(source: SourceConfig, cache: Path) -> list[dict[str, Any]]:
    return list(load_rows(source, cache).table)


@pytest.mark.parametrize("name", ["x.csv", "x.CSV", "x.tsv", "x.csv.gz", "x.tsv.gz"])
def test_csv_keeps_strings_and_true_lines(name: str, write: Write) -> None:
    text = '\ufeffa,b\r\n1,"two\nlines"\n\n  \n007,"say ""hi"""\n'
    path = write(name, text if "csv" in name.lower() else text.replace(",", "\t"))
    assert list(read_rows(path)) == [
        Row(2, {"a": "1", "b": "two\nlines"}), Row(6, {"a": "007", "b": 'say "hi"'}),
    ]  # fmt: skip
    assert column_names(path) == ["a", "b"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_columns=st.integers(1, 3),
    cells=st.lists(CELL, max_size=12),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    ending=st.sampled_from(["\n", "\r\n"]),
    tabs=st.booleans(),
)
def test_what_the_csv_module_writes_is_read_back(
    num_columns: int, cells: list[str], quoting: Any, ending: str, tabs: bool, tmp_path: Path
) -> None:
    # The csv module of Python 3.11 leaves "\r" unquoted where lines end in "\n": such a file is read as two lines.
    assume(quoting == csv.QUOTE_ALL or ending == "\r\n" or not any("\r" in cell for cell in cells))
    names = [f"column {number}" for number in range(num_columns)]
    rows = [cells[at : at + num_columns] for at in range(0, len(cells) - num_columns + 1, num_columns)]
    rows = [row for row in rows if num_columns > 1 or not row[0].isspace()] + [["x"] * num_columns]
    buffer = io.StringIO(newline="")
    delimiter = "\t" if tabs else ","
    csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=ending).writerows([names, *rows])
    path = tmp_path / ("x.tsv" if tabs else "x.csv")
    path.write_bytes(buffer.getvalue().encode())
    read = list(read_rows(path))
    assert [list(row.values.values()) for row in read if isinstance(row, Row)] == rows
    lines = [row.line for row in read]
    assert lines == sorted(set(lines))


def test_csv_reads_on_after_bad_rows(write: Write) -> None:
    big = "x" * (readers.MAX_FIELD_CHARACTERS + 1)
    path = write("x.csv", b'a,b\n1\n2,\xff\n3,\0\n"4"x,y\n5,' + big.encode() + b'\n6,fine\n7,"open\n8,never closed\n')
    rows = list(read_rows(path))
    assert [row.line for row in rows] == [2, 3, 4, 5, 6, 7, 8]
    assert [row.reason if isinstance(row, BadRow) else "" for row in rows] == [
        "1 columns where the header has 2",
        "column 'b' is not valid UTF-8",
        "column 'b' holds a NUL byte",
        "',' expected after '\"'",
        "field larger than field limit (10000000)",
        "",
        "unexpected end of data (read up to line 9)",
    ]


def test_jsonl(write: Write) -> None:
    lines = [
        b'\xef\xbb\xbf{"a": 1, "b": null, "c": [1, {"d": "\xc3\xa9"}]}', b"", b"[1]", b'{"a": tru}', b'{"a": "\xff"}',
        b'{"a": "\\ud800"}', b'{"a": "\\u0000"}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 2.5}',
    ]  # fmt: skip
    path = write("x.jsonl.gz", b"\n".join(lines))
    first, *bad, last = read_rows(path)
    assert first == Row(1, {"a": 1, "b": None, "c": '[1, {"d": "é"}]'})
    assert last == Row(10, {"a": 2.5})
    assert [row.line for row in bad] == [3, 4, 5, 6, 7, 8, 9]
    reasons = [row.reason for row in bad if isinstance(row, BadRow)]
    assert len(reasons) == len(bad)
    assert reasons[0] == "a JSON list, not an object"
    assert reasons[1].startswith("not JSON: Expecting value")
    assert reasons[2:5] == ["not valid UTF-8", "column 'a' is not valid UTF-8", "column 'a' holds a NUL byte"]
    assert column_names(path) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["x.fasta", "x.fa.gz", "x.faa"])
def test_fasta(name: str, write: Write) -> None:
    path = write(name, "stray\nmore\n>P1 kinase, human\nMKV\n\nLAA \n>P2\n>\nMM\n>P3\r\nM K\r\n")
    assert list(read_rows(path)) == [
        BadRow(1, "text before the first >"),
        Row(3, {"id": "P1", "description": "kinase, human", "sequence": "MKVLAA"}),
        BadRow(7, "entry 'P2' without a sequence"),
        BadRow(8, "entry without an id"),
        Row(10, {"id": "P3", "description": "", "sequence": "MK"}),
    ]
    assert column_names(path) == ["id", "description", "sequence"]


@pytest.mark.parametrize("header", ["", "SMILES Name\n"])
def test_smi(header: str, write: Write) -> None:
    path = write("x.smi", header + "CCO\tethanol, plain one\n\nC1CC1\n")
    first = 2 if header else 1
    assert list(read_rows(path)) == [
        Row(first, {"smiles": "CCO", "name": "ethanol, plain one"}), Row(first + 2, {"smiles": "C1CC1", "name": ""}),
    ]  # fmt: skip
    assert column_names(path) == ["smiles", "name"]


@pytest.mark.parametrize("name", ["x.parquet", "x.parquet.gz"])
def test_parquet(name: str, write: Write) -> None:
    buffer = io.BytesIO()
    columns = {"n": list(range(2500)), "f": [0.5] * 2500, "t": [None] + ["é"] * 2499, "l": [[1]] * 2500}
    pq.write_table(pa.table(columns), buffer)
    path = write(name, buffer.getvalue())
    rows = list(read_rows(path))
    assert rows[0] == Row(1, {"n": 0, "f": 0.5, "t": None, "l": "[1]"})
    assert rows[-1] == Row(2500, {"n": 2499, "f": 0.5, "t": "é", "l": "[1]"})
    assert column_names(path) == ["n", "f", "t", "l"]


def test_text_of_parquet_that_is_not_marked_as_such(write: Write) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"smiles": pa.array([b"CCO", b"C\xff"], pa.binary())}), buffer)
    good, bad = read_rows(write("x.parquet", buffer.getvalue()))
    assert good == Row(1, {"smiles": "CCO"})
    assert isinstance(bad, BadRow) and "not valid UTF-8" in bad.reason


def test_text_of_parquet_that_is_wrongly_marked(write: Write) -> None:
    array = pa.Array.from_buffers(pa.string(), 1, pa.array([b"C\xff"], pa.binary()).buffers())
    buffer = io.BytesIO()
    pq.write_table(pa.table({"smiles": array}), buffer)
    with pytest.raises(UserError, match="x.parquet: holds text that is not UTF-8"):
        list(read_rows(write("x.parquet", buffer.getvalue())))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.xyz", "a", "cannot be read: suffix '.xyz'; known are csv, tsv, .*Rename or convert it"),
        ("x.gz", "a", "suffix 'none'"),
        ("x.csv", "", "is empty; line 1 must name the columns"),
        ("x.csv", "\n \n", "is empty"),
        ("x.csv.gz", "", "is empty"),
        ("x.csv", "CCO,0.5\nC,1\n", "has no header: line 1 holds the number 0.5"),
        ("x.csv", "CCO,5,-1\nC,1,2\n", "has no header: line 1 holds the number -1"),
        ("x.csv", "1,2\n3,4\n", "has no header: line 1 holds the number 1"),
        ("x.csv", "a,b,a\n", "column 'a' is there 2 times"),
        (
            "x.csv",
            "a,,\n1,,\n2,,x\n",
            "line 3 holds 'x' in column 3, which line 1 gives no name, and 2 have none; .*Name",
        ),
        ("x.csv", "a,_line\n", "column '_line' is reserved"),
        ("x.csv", "a,b\n", "holds no row"),
        ("x.csv", "a,b\n1,2".encode("utf-16"), "line 1 is not UTF-8"),
        ("x.csv", '"a"b,c\n1,2', "line 1 cannot be read"),
        ("x.jsonl", "", "holds no row"),
        ("x.fasta", "\n", "holds no row"),
        ("x.smi", "smiles name\n", "holds no row"),
        ("x.parquet", "PAR1 nonsense", "is no whole parquet file"),
        ("x.parquet", "", "is no whole parquet file"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str | bytes, message: str, write: Write) -> None:
    path = write(name, content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(path))
    [problem] = caught.value.problems
    assert problem.startswith(f"{path}: ")


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "fasta", "smi", "parquet"])
def test_damaged_gzip(suffix: str, damage: str, tmp_path: Path) -> None:
    lines = {"csv": "a,b\n", "jsonl": "", "fasta": ">x\n", "smi": "", "parquet": ""}[suffix]
    row = '{"a": 1}\n' if suffix == "jsonl" else "C,C\n"
    data = bytearray(gzip.compress((lines + row * 5000).encode()))
    if damage == "flipped":
        data[-6] ^= 255
    path = tmp_path / f"x.{suffix}.gz"
    path.write_bytes(b"not gzipped" if damage == "plain" else data[:-12] if damage == "cut" else data)
    with pytest.raises(UserError, match="is no whole gzip file"):
        list(read_rows(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.csv: no such file"):
        column_names(tmp_path / "none.csv")
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(UserError, match="x.csv: is a folder"):
        list(read_rows(tmp_path / "x.csv"))
    with pytest.raises(UserError, match="no such file"):
        load_rows(source_of(path=str(tmp_path / "none.csv")), tmp_path)


def test_load_is_memory_mapped_and_built_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("x.csv", "a,b\n1,x\n2\n3,z\n")
    cache = tmp_path / "deep" / "cache"
    rows = load_rows(source_of(path=str(path)), cache)
    place = {"_file": str(path), "_split": ""}
    assert list(rows.table) == [
        {"a": "1", "b": "x", "_line": 2, "_bad": "", **place},
        {"a": None, "b": None, "_line": 3, "_bad": "1 columns where the header has 2", **place},
        {"a": "3", "b": "z", "_line": 4, "_bad": "", **place},
    ]
    assert (rows.name, rows.columns, rows.given_splits, rows.num_bad) == (str(path), ["a", "b"], [], 1)
    [file] = cache.iterdir()
    assert file.name.startswith("rows-")
    assert [entry["filename"] for entry in rows.table.cache_files] == [str(file)]

    monkeypatch.setattr(sources, "_write", lambda *_: pytest.fail("was built twice"))
    assert loaded(source_of(path=str(path)), cache) == list(rows.table)


def test_changed_contents_are_seen(write: Write, tmp_path: Path) -> None:
    source = source_of(path=str(write("x.csv", "a\n1\n")))
    assert [row["a"] for row in loaded(source, tmp_path / "cache")] == ["1"]
    write("x.csv", "a\n2\n")
    assert [row["a"] for row in loaded(source, tmp_path / "cache")] == ["2"]


def test_nothing_is_left_when_reading_fails(write: Write, tmp_path: Path) -> None:
    path = write("x.csv.gz", "a\n" + "\n".join(str(number) for number in range(9000)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is no whole gzip file"):
        load_rows(source_of(path=str(path)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(write: Write, tmp_path: Path) -> None:
    path = write("x.csv", "a\n1\n")
    with pytest.raises(UserError, match="x.csv/cache: cannot be written"):
        load_rows(source_of(path=str(path)), path / "cache")


def test_one_that_was_faster_is_kept(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = source_of(path=str(write("x.csv", "a\n1\n"))), tmp_path / "cache"
    build = sources._write

    def second(name: str, parts: Any, file: Path) -> None:
        build(name, parts, file)
        inode = file.stat().st_ino
        build(name, parts, file)
        assert file.stat().st_ino == inode

    monkeypatch.setattr(sources, "_write", second)
    assert len(loaded(source, cache)) == 1
    assert len(list(cache.iterdir())) == 1


def test_many_batches(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BATCH_ROWS", 7)
    path = write("x.csv", "a\n" + "\n".join(f"v{number}" for number in range(50)))
    assert [row["a"] for row in loaded(source_of(path=str(path)), tmp_path / "c")] == [f"v{n}" for n in range(50)]


def test_files_per_split(write: Write, tmp_path: Path) -> None:
    paths = {split: str(write(f"{split}.csv", f"a\n{split}\n")) for split in ("train", "valid", "test")}
    rows = load_rows(source_of(path=paths), tmp_path / "cache")
    assert [(row["a"], row["_split"], row["_file"]) for row in rows.table] == [(s, s, p) for s, p in paths.items()]
    assert rows.given_splits == ["train", "valid", "test"]
    assert rows.name == ", ".join(paths.values())


def test_files_of_one_source_must_have_the_same_columns(write: Write, tmp_path: Path) -> None:
    paths = {"train": str(write("train.csv", "a,b\n1,2\n")), "test": str(write("test.csv", "a\n1\n"))}
    with pytest.raises(UserError, match="test.csv has the columns a, but .*train.csv has a, b; "):
        load_rows(source_of(path=paths), tmp_path / "cache")


@pytest.mark.parametrize(
    ("values", "stored", "dtype"),
    [
        ([1, 2], [1, 2], "int64"),
        ([1, 2.5, None], [1.0, 2.5, None], "float64"),
        ([1, "x", True, 2.5], ["1", "x", "true", "2.5"], "string"),
        ([True, False], [True, False], "bool"),
        ([True, 1], ["true", "1"], "string"),
        ([2**63, 1], [str(2**63), "1"], "string"),
        ([None, None], [None, None], "string"),
        ([[1], "x"], ["[1]", "x"], "string"),
    ],
)
def test_jsonl_columns_have_one_type(values: Any, stored: Any, dtype: str, write: Write, tmp_path: Path) -> None:
    path = write("x.jsonl", "\n".join(json.dumps({"a": value, "b": "é"}) for value in values))
    table = load_rows(source_of(path=str(path)), tmp_path / "cache").table
    assert table["a"][:] == stored
    assert table.features["a"].dtype == dtype


def test_jsonl_objects_may_differ_in_keys(write: Write, tmp_path: Path) -> None:
    path = write("x.jsonl", '{"a": 1}\nbroken\n{"b": 2}')
    assert column_names(path) == ["a", "b"]
    rows = loaded(source_of(path=str(path)), tmp_path / "cache")
    assert [(row["a"], row["b"], bool(row["_bad"])) for row in rows] == [(1, None, 0), (None, None, 1), (None, 2, 0)]


def test_reserved_names_are_refused_in_jsonl_too(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x.jsonl: column '_bad' is reserved"):
        load_rows(source_of(path=str(write("x.jsonl", '{"a": 1}\n{"_bad": 1}'))), tmp_path / "cache")


def test_a_recipe_keeps_its_types_and_splits(tmp_path: Path) -> None:
    pytest.importorskip("pydta")
    rows = load_rows(source_of(recipe="pydta"), tmp_path)
    assert (rows.name, rows.columns) == ("recipe pydta", ["smiles", "sequence", "affinity", "key"])
    assert (len(rows.table), rows.given_splits) == (5000, ["train", "valid", "test"])
    assert rows.table.features["affinity"].dtype == "float64"
    assert {key: rows.table[0][key] for key in ("_file", "_line", "_split")} == {
        "_file": "recipe pydta", "_line": 1, "_split": "train",
    }  # fmt: skip
    with pytest.raises(UserError, match="Did you mean pydta?"):
        load_rows(source_of(recipe="pydtaa"), tmp_path)


def test_a_hub_data_set_is_flattened_split_and_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(count: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict(
            {"pair": [{"en": f"e{row}", "fr": "f"} for row in range(count)], "label": list(range(count))}
        )

    calls: list[tuple[str, str | None]] = []

    def load_dataset(name: str, config: str | None) -> datasets.DatasetDict:
        calls.append((name, config))
        return datasets.DatasetDict(train=part(1500), validation=part(2), unsupervised=part(1))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        rows = load_rows(source_of(hub="wmt:en-fr"), tmp_path)
    assert calls == [("wmt", "en-fr")]
    assert rows.columns == ["pair.en", "pair.fr", "label"]
    assert rows.given_splits == ["train", "valid"]
    assert rows.table[1499]["pair.en"] == "e1499"
    assert rows.table[1501] == {
        "pair.en": "e1", "pair.fr": "f", "label": 1, "_file": "hub wmt:en-fr (validation)", "_line": 2,
        "_split": "valid", "_bad": "",
    }  # fmt: skip


def test_a_folder_is_no_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows would be kept under a name that says nothing of what is in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="hub data: is a folder or file here.*Give its files with `path:`"):
        load_rows(source_of(hub="data"), tmp_path)


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_failure_names_the_data_set_and_the_mode(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    mode = r"on \(HF_HUB_OFFLINE\)" if offline else "off"
    message = f"hub a/b: cannot be loaded: ConnectionError: no route; offline mode is {mode}"
    with pytest.raises(UserError, match=message):
        load_rows(source_of(hub="a/b"), tmp_path)


def test_a_hub_data_set_without_known_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict(extra=datasets.Dataset.from_dict({"a": [1]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: found)
    with pytest.raises(UserError, match="hub a/b: has the splits extra; known are train, "):
        load_rows(source_of(hub="a/b"), tmp_path)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_reading_is_a_stream(name: str, write: Write) -> None:
    """The first rows come before a fault at the end of the file is met."""
    line = "C" * 50 if name == "x.csv" else '{"a": 1}'
    path = write(name + ".gz", "a\n" * (name == "x.csv") + f"{line}\n" * 20_000)
    path.write_bytes(path.read_bytes()[:-9])
    rows = read_rows(path)
    assert isinstance(next(rows), Row)
    assert column_names(path) == ["a"]
    with pytest.raises(UserError, match="is no whole gzip file"):
        list(rows)


def test_blanks_around_names_are_not_part_of_them(write: Write) -> None:
    path = write("x.csv", "id , smiles,\tweight\n1,CCO,2\n")
    assert column_names(path) == ["id", "smiles", "weight"]
    assert list(read_rows(path)) == [Row(2, {"id": "1", "smiles": "CCO", "weight": "2"})]


def test_a_name_may_be_a_year_and_empty_columns_none(write: Write) -> None:
    """As spreadsheets write them. One column without a name is that of pandas' index."""
    path = write("x.csv", "gene,2010,2020,,\nTP53,1.5,2,,\nEGFR,3\n")
    assert column_names(path) == ["gene", "2010", "2020"]
    first, short = read_rows(path)
    assert first == Row(2, {"gene": "TP53", "2010": "1.5", "2020": "2"})
    assert short == BadRow(3, "2 columns where the header has 5", {"gene": "EGFR", "2010": "3"})
    assert list(read_rows(write("y.csv", ",smiles\n0,CCO\n"))) == [Row(2, {"": "0", "smiles": "CCO"})]


@pytest.mark.parametrize(("name", "header"), [("x.csv", "smiles;weight"), ("x.csv", "a\tb"), ("x.tsv", "a,b")])
def test_another_separator_is_named(write: Write, name: str, header: str) -> None:
    with pytest.raises(UserError, match=r"line 1 is one column, .*between commas in a .csv and between tabs in a .tsv"):
        column_names(write(name, f"{header}\n1\n"))


def test_what_can_be_read_of_a_row_of_another_width_is_kept(write: Write) -> None:
    wide, illegible = read_rows(write("x.csv", b"a,b\n1,2,3\n1,\xff,3\n"))
    assert isinstance(wide, BadRow) and wide.values == {"a": "1", "b": "2"}
    assert isinstance(illegible, BadRow) and illegible.values is None


def test_numbers_of_32_bits_are_those_that_were_meant(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"dose": pa.array([0.1, 25, None], pa.float32())}), tmp_path / "x.parquet")
    assert [row.values["dose"] for row in read_rows(tmp_path / "x.parquet") if isinstance(row, Row)] == [0.1, 25, None]
