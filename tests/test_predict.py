"""`tagllm predict` asks as the tag was trained and scored, and says what it could not ask whole."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.commands import Run, config, fails

ROOT = Path(__file__).parents[1]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_text_is_written_as_eval_scored_it(run: Run, folder: Path) -> None:
    """As long, and with as many beams."""
    file = config(
        folder, "texts", tags={"T": {"kind": "function", "length": 2}}, data__template="{smiles} <T> {output}",
        data__target=[], data__output="name", evaluation={"max_new_tokens": 2, "beams": 2, "generated_rows": 6},
    )  # fmt: skip
    assert run("train", file).exit_code == 0
    assert run("eval", "runs/texts").exit_code == 0
    lines = (folder / "runs/texts/generated.jsonl").read_text().split("\n")
    scored = {line["given"]: line["generated"] for line in map(json.loads, filter(None, lines))}
    assert run("predict", "runs/texts", folder / "rows.csv", folder / "texts.csv").exit_code == 0
    found = {row["smiles"]: row["T"] for row in rows_of(folder / "texts.csv")}
    assert len(scored) > 2 and {given: found[given] for given in scored} == scored
    longer = run("predict", "runs/texts", folder / "rows.csv", folder / "longer.csv", "--max-new-tokens", 9)
    assert longer.exit_code == 0
    assert sum(len(row["T"]) for row in rows_of(folder / "longer.csv")) > sum(map(len, found.values()))


@pytest.fixture
def spaced(run: Run, folder: Path) -> Path:
    fields = {"smiles": {"characters": "spaced"}}
    file = config(folder, "spaced", data__fields=fields, data__template="{smiles} of {name} weighs <W>")
    if not (folder / "runs/spaced/library").is_dir():
        assert run("train", file).exit_code == 0
    return folder / "runs/spaced"


def test_settings_go_with_a_column_of_another_name(run: Run, folder: Path, spaced: Path) -> None:
    for names in ("smiles,name", "molecule,name"):
        (folder / "renamed.csv").write_text(f"{names}\nCCO,x1\nCCN(C)C,x2\n")
        options = [] if names.startswith("smiles") else ["--template", "{molecule} of {name} weighs <W>"]
        told = run("predict", spaced, folder / "renamed.csv", folder / f"{names[:3]}.csv", *options)
        assert told.exit_code == 0, told.stderr
    assert [row["W"] for row in rows_of(folder / "smi.csv")] == [row["W"] for row in rows_of(folder / "mol.csv")]


def test_settings_whose_column_cannot_be_told_are_not_dropped(run: Run, folder: Path, spaced: Path) -> None:
    template = ["--template", "{molecule} weighs <W>"]
    told = run("predict", spaced, folder / "rows.csv", folder / "x.csv", *template)
    fails(told, "it has no {smiles}", "spaced", "Name the column smiles")


def test_rows_that_were_cut_are_counted(run: Run, folder: Path) -> None:
    trained = run("train", config(folder, "short"), "data.max_tokens=40")
    assert trained.exit_code == 0, trained.stderr
    (folder / "long.csv").write_text(f"smiles\nC\n{'CN' * 30}\n{'CO' * 30}\n")
    told = run("predict", "runs/short", folder / "long.csv", folder / "cut.csv")
    assert told.exit_code == 0, told.stderr
    assert "3 rows, 0 without a prediction, 2 cut" in told.stdout


def test_a_quote_that_is_not_closed_loses_no_row(run: Run, folder: Path, spaced: Path) -> None:
    rows = [f"{at},CCO,x{at}" for at in range(9)]
    (folder / "open.csv").write_text("\n".join(["id,smiles,name", *rows[:2], '2,"CCC,x2', *rows[3:]]) + "\n")
    told = run("predict", spaced, folder / "open.csv", folder / "never.csv")
    fails(told, "open.csv, line 4", "read up to line 10", "Close it")
    assert not (folder / "never.csv").exists()
    file = config(folder, "open", data__path=str(folder / "open.csv"), data__target="id", data__on_bad_row="skip")
    fails(run("train", file), "open.csv, line 4", "read up to line 10", "a quote that is not closed", "Close it")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_text_that_cannot_be_read_matters_where_the_prompt_has_it(
    run: Run, folder: Path, spaced: Path, suffix: str
) -> None:
    """The template has smiles and name; ids and legible values stand in any case."""
    columns = {
        "id": [b"1", b"2", b"3"],
        "note": [b"caf\xe9", b"", b"\0"],
        "smiles": [b"CCO"] * 3,
        "name": [b"x", b"\xe9", b"y"],
    }
    file, out = folder / f"latin.{suffix}", folder / f"latin_out_{suffix}.csv"
    if suffix == "parquet":
        parquet.write_table(pa.table({name: pa.array(values, pa.binary()) for name, values in columns.items()}), file)
    else:
        lines = zip(*columns.values(), strict=True)
        file.write_bytes(b"\n".join([",".join(columns).encode(), *(b",".join(line) for line in lines)]) + b"\n")
    told = run("predict", spaced, file, out)
    assert told.exit_code == 0 and "3 rows, 1 without a prediction, 2 with cells left empty" in told.stdout, told.output
    one, two, three = rows_of(out)
    assert all(row["W"] and not row["note"] and not row["tagllm_error"] for row in (one, three))
    assert [row["id"] for row in (one, two, three)] == ["1", "2", "3"] and two["smiles"] == "CCO"
    assert two["W"] == "" and "column 'name' is not valid UTF-8" in two["tagllm_error"]


def test_a_prompt_that_answers_before_it_has_read_is_noted(run: Run, folder: Path, spaced: Path) -> None:
    for template, noted in (("<W> of {smiles} {name}", True), ("{smiles} of {name} <W>", False)):
        told = run("predict", spaced, folder / "rows.csv", folder / "blind.csv", "--template", template)
        assert told.exit_code == 0 and ("no field stands before <W>" in told.stderr) == noted, told.output


def test_a_domain_tag_alone_answers_nothing(run: Run, folder: Path) -> None:
    tags = {"SMILES": {"kind": "domain", "length": 2}}
    file = config(folder, "domain_alone", tags=tags, data__template="a <SMILES> {smiles}", data__target=[])
    assert run("train", file).exit_code == 0
    told = run("predict", "runs/domain_alone", folder / "rows.csv", folder / "never.csv")
    fails(told, "holds <SMILES> and no function tag", "--library")


def test_a_row_with_a_cell_too_many_keeps_the_others(run: Run, folder: Path, spaced: Path) -> None:
    (folder / "wide.csv").write_text("id,smiles,name\n1,CCO,x1\n2,CCN,x2,more\n")
    assert run("predict", spaced, folder / "wide.csv", folder / "wide_out.csv").exit_code == 0
    first, second = rows_of(folder / "wide_out.csv")
    assert first["W"] and second["W"] == "" and (second["id"], second["smiles"]) == ("2", "CCN")
    assert "4 columns where the header has 3" in second["tagllm_error"]


def test_readme_s_way_from_python(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", config(folder, "served")).exit_code == 0
    capsys.readouterr()
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "runs/solubility/library" in block
    exec(block.replace("runs/solubility/library", str(folder / "runs/served/library")), {})
    shown = capsys.readouterr().out
    assert re.match(r"\['W'\] \[\[-?\d", shown) and shown.endswith("'smiles is empty; the template needs it']\n")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_library_is_asked_of_weights_as_it_was_trained_on(run: Run, folder: Path, kind: str) -> None:
    trained = run("train", config(folder, kind), f"backbone.quantize={kind}")
    assert trained.exit_code == 0, trained.stderr
    answers = {}
    for name, asked in (("run", [f"runs/{kind}"]), ("library", [f"runs/{kind}/library"])):
        told = run("predict", *asked, folder / "rows.csv", folder / f"{kind}_{name}.csv")
        assert told.exit_code == 0, told.stderr
        answers[name] = [row["W"] for row in rows_of(folder / f"{kind}_{name}.csv")]
    whole = folder / f"{kind}_whole.csv"
    assert run("predict", f"runs/{kind}/library", folder / "rows.csv", whole, "backbone.quantize=none").exit_code == 0
    assert answers["run"] == answers["library"] != [row["W"] for row in rows_of(whole)]


def test_classes_have_a_probability_each(run: Run, folder: Path) -> None:
    tags = {"K": {"kind": "function", "length": 2, "head": {"classes": ["b", "a"]}}}
    file = config(folder, "probable", tags=tags, data__template="{smiles} is <K>", data__target="kind")
    assert run("train", file).exit_code == 0
    assert run("predict", "runs/probable", folder / "rows.csv", folder / "probable.csv").exit_code == 0
    for row in rows_of(folder / "probable.csv"):
        each = {name: float(row[f"K_probability_{name}"]) for name in ("b", "a")}
        assert sum(each.values()) == pytest.approx(1) and row["K"] == max(each, key=each.__getitem__)


def test_an_override_that_is_none_of_its_keys_is_told(run: Run, folder: Path, spaced: Path) -> None:
    for override, told in (
        ("backbone.dtype", "takes only backbone.KEY=VALUE and engine.KEY=VALUE"), ("optim.steps=1", "takes only"),
        ("backbone.dtyp=fp32", "overrides: backbone.dtyp is no key"),
        ("engine.zero_stage=4", "overrides: engine.zero_stage"),
    ):  # fmt: skip
        fails(run("predict", spaced / "library", folder / "rows.csv", folder / "x.csv", override), told)


def test_a_field_is_asked_as_the_function_tag_had_it_and_not_as_a_domain_tag(run: Run, folder: Path) -> None:
    """Stage 1 saw no more than a token of each molecule, the head all of it."""
    short = {"smiles": {"max_tokens": 1}}
    domain = config(
        folder,
        "beginning",
        tags={"D": {"length": 2}},
        data__template="<D> {smiles}",
        data__fields=short,
        data__target=[],
    )
    assert run("train", domain).exit_code == 0
    tags = {"D": {"load": "runs/beginning/library"}, "W": {"kind": "function", "length": 2, "head": {"reads": "both"}}}
    assert run("train", config(folder, "entire", tags=tags, data__template="<D> {smiles} weighs <W>")).exit_code == 0
    assert run("eval", "runs/entire").exit_code == 0
    assert run("predict", "runs/entire", folder / "rows.csv", folder / "entire.csv").exit_code == 0
    predicted = {f"line {n + 2}": float(row["W"]) for n, row in enumerate(rows_of(folder / "entire.csv"))}
    held_out = {
        row["row"].split(", ")[1]: float(row["predicted"]) for row in rows_of(folder / "runs/entire/held_out.csv")
    }
    assert len(held_out) > 2 and {line: predicted[line] for line in held_out} == pytest.approx(held_out, rel=1e-4)


def test_predict_refuses_what_would_harm(run: Run, folder: Path) -> None:
    assert run("train", config(folder, "harm")).exit_code == 0
    rows = folder / "rows.csv"
    fails(run("predict", "runs/harm", rows, rows), "never overwritten")
    fails(run("predict", "runs/harm", rows, folder / "x.xyz"), "xyz")
    (folder / "clash.csv").write_text("smiles,W\nC,1\n")
    fails(run("predict", "runs/harm", folder / "clash.csv", folder / "y.csv"), "already")
    (folder / "later.jsonl").write_text('{"smiles": "C"}\n{"smiles": "CC", "W": 1}\n')
    fails(run("predict", "runs/harm", folder / "later.jsonl", folder / "y.csv"), "later.jsonl", "'W' already")
    unusable, late = '{"smiles": ""}\n' * 10_000, '{"smiles": "CC", "W": 1}\n'  # so many objects tell the columns
    (folder / "later.jsonl").write_text(unusable + late)
    told = run("predict", "runs/harm", folder / "later.jsonl", folder / "y.csv")
    fails(told, "later.jsonl, line 10001", "'W' already")
    (folder / "other.csv").write_text("smile\nC\n")
    fails(run("predict", "runs/harm", folder / "other.csv", folder / "y.csv"), "Did you mean smile?")
    fails(run("predict", "runs/harm", rows, folder / "y.csv", "--tag", "V"), "no function tag")
    assert not (folder / "y.csv").exists()
