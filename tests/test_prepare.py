"""Named data sets: every recipe on small files of the schema it is published in, and what `prepare` promises."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tagllm.cli import app
from tagllm.config import SPLITS, SourceConfig
from tagllm.data import prepare as preparing
from tagllm.data.prepare import Prepared, prepare
from tagllm.data.recipes import RECIPES, libreoffice, recipe_of
from tagllm.data.recipes.hub import FLORES, LANGUAGES
from tagllm.data.sources import load_rows
from tagllm.data.splits import split_rows
from tagllm.errors import UserError
from tagllm.files import DamagedFile

RUNNER = CliRunner()
SHARED = Path(__file__).parents[2] / "shared" / "data"
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"


def rows_of(data: Prepared) -> list[tuple[str | None, dict[str, Any]]]:
    return [(split, row) for split, file in data.files.items() for row in pq.read_table(file).to_pylist()]


def gzipped(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


def davis(folder: Path) -> Path:
    lines = [
        f"{drug},C{'C' * drug}O,K{target},{PROTEIN},{5 + drug / 10},{drug % 5}"
        for drug in range(10)
        for target in (1, 2)
    ]
    gzipped(folder / "davis.train.csv.gz", "drug_id,smiles,target_id,sequence,pKd,fold\n" + "\n".join(lines) + "\n")
    return folder


def oneil(folder: Path) -> Path:
    for split, pair in (("train", "A,CC,B,CO"), ("valid", "A,CC,C,CN"), ("test", "C,CN,B,CO")):
        text = "drug_1,smiles_1,drug_2,smiles_2,cell_line,synergy_loewe\n" + f"{pair},A2058,-3.5\n{pair},HT29,7\n"
        gzipped(folder / f"oneil.{split}.csv.gz", text)
    return folder


def proteins(folder: Path) -> Path:
    entries = {"good": PROTEIN, "again": PROTEIN, "short": "MKT", "odd": PROTEIN + "X", "low": PROTEIN[::-1].lower()}
    gzipped(folder / "DB.fasta.gz", "".join(f">{name} x\n{sequence}\n" for name, sequence in entries.items()))
    return folder


def help_tables(folder: Path) -> Path:
    for split in ("train", "valid", "test"):
        line = "\t".join(f"the {split} sentence in {language}" for language in libreoffice.LANGUAGES)
        gzipped(folder / f"libreoffice_help.{split}.tsv.gz", "\t".join(libreoffice.LANGUAGES) + f"\n{line}\n")
    return folder


def help_pages(folder: Path) -> Path:
    for language in libreoffice.LANGUAGES:
        page = folder / ("en-US" if language == "en" else language) / "text" / "shared" / "a.html"
        page.parent.mkdir(parents=True)
        only_english = '<p id="par_2" class="paragraph">Only English people can read this one.</p>' * (language == "en")
        page.write_text(
            f'<html><body><p id="par_1" >Opens   the <b>page</b><span hidden="true"> on a Mac</span> of '
            f'{language}.</p><p>no id</p>{only_english}<p id="par_3">short</p></body></html>'
        )  # fmt: skip
    return folder


def patents(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for stem, year in (("train_val", 2015), ("test", 2020)):
        text = f"Drug_ID,Drug,Target_ID,Target,Y,Year\n1,CCO,T,{PROTEIN},4.5,{year}\n1,CCO,T,{PROTEIN},4.6,{year}\n"
        (folder / f"{stem}.csv").write_text(text)
    return folder


def drugcomb(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for stem, drugs in (("train_val", "a,CC,b,CO"), ("test", "b,CO,c,CN")):
        head = "Drug1_ID,Drug1,Drug2_ID,Drug2,Cell_Line_ID,CellLine,Y\n"
        (folder / f"{stem}.csv").write_text(head + f'{drugs},HT29,"[0.1, 0.2]",12.5\n')
    return folder


def hub_copy(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> Path:
    """A repository as the hub keeps it: parquet files, and configs named in its card."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            (folder / config).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def opus(folder: Path) -> Path:
    def pairs(*texts: str) -> list[dict[str, Any]]:
        return [{"translation": {"en": text, "fr": f"{text} en français"}} for text in texts]

    return hub_copy(
        folder, {"en-fr": {"test": pairs("a"), "validation": pairs("b"), "train": pairs("a", "c", "b", " ")}}
    )


def flores(folder: Path) -> Path:
    def rows(code: str) -> list[dict[str, Any]]:
        return [{"id": n, "text": f"sentence {n} in {code}"} for n in (1, 2)]

    return hub_copy(folder, {code: {"dev": rows(code), "devtest": rows(code)} for code in FLORES.values()})


def affinities(folder: Path) -> Path:
    row = {"seq": PROTEIN, "smiles": "OCC", "smiles_can": "CCO", "affinity_uM": 1.0, "neg_log10_affinity_M": 6.0}
    return hub_copy(folder, {"default": {"train": [row, row | {"smiles_can": "CCN"}]}})


SMALL: dict[str, tuple[Callable[[Path], Path], dict[str, int]]] = {
    "davis": (davis, {"train": 16, "test": 4}),
    "oneil": (oneil, {"train": 2, "valid": 2, "test": 2}),
    "mmseqs-proteins": (proteins, {"all": 2}),
    "peptides": (proteins, {"all": 3}),
    "libreoffice-help": (help_tables, {"train": 1, "valid": 1, "test": 1}),
    "bindingdb-patent": (patents, {"train": 2, "test": 2}),
    "drugcomb-css": (drugcomb, {"train": 1, "test": 1}),
    "opus100-en-fr": (opus, {"test": 1, "valid": 1, "train": 1}),
    "flores": (flores, {"valid": 2, "test": 2}),
    "binding-affinity": (affinities, {"all": 2}),
    "binding-affinity-proteins": (affinities, {"all": 1}),
    "binding-affinity-molecules": (affinities, {"all": 2}),
}


def prepared(name: str, tmp_path: Path) -> Prepared:
    if name in ("mmseqs-proteins", "binding-affinity-proteins"):
        pytest.importorskip("peptides")
    return prepare(recipe_of(name), SMALL[name][0](tmp_path / "origin"), tmp_path / "cache")


def test_every_recipe_is_tested() -> None:
    """The packaged ones on their packages, in test_recipes.py; OPUS-100's seven are one function."""
    packaged = {recipe.name for recipe in RECIPES.values() if recipe.source.startswith("package ")}
    opus_pairs = {f"opus100-en-{language}" for language in LANGUAGES}
    assert {*SMALL, *packaged, *opus_pairs} == set(RECIPES)
    assert all(recipe.licence and recipe.source and "key" in recipe.columns for recipe in RECIPES.values())


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_the_published_schema(name: str, tmp_path: Path) -> None:
    data = prepared(name, tmp_path)
    assert data.about["rows"] == SMALL[name][1]
    recipe = RECIPES[name]
    for _, row in rows_of(data):
        assert {column: type(value) for column, value in row.items()} == recipe.columns
    keys = [row["key"] for _, row in rows_of(data)]
    if name not in ("oneil", "bindingdb-patent"):  # a pair may be measured again
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", SMALL)
def test_a_config_reads_what_was_prepared(name: str, tmp_path: Path) -> None:
    data = prepared(name, tmp_path)
    source = SourceConfig.model_validate({"recipe": name, "template": "{key}"})
    rows = load_rows(source, tmp_path / "cache")
    assert rows.columns == list(RECIPES[name].columns)
    assert len(rows.table) == sum(data.about["rows"].values())
    assert set(rows.given_splits) == {split for split in data.files if split}


def test_values_are_those_of_the_files(tmp_path: Path) -> None:
    split, row = rows_of(prepared("davis", tmp_path / "davis"))[0]
    assert (split, row["smiles"], row["affinity"], row["drug"]) == ("train", "CO", 5.0, "0")
    assert {
        row["drug"]
        for split, row in rows_of(prepare(recipe_of("davis"), tmp_path / "davis/origin", tmp_path))
        if split == "test"
    } == {"4", "9"}
    (_, pair), *_ = rows_of(prepared("oneil", tmp_path / "oneil"))
    assert (pair["cell_line"], pair["synergy"]) == ("A2058", -3.5)
    molecules = rows_of(prepared("binding-affinity-molecules", tmp_path / "molecules"))
    assert {row["smiles"]: round(row["qed"], 4) for _, row in molecules} == {"CCO": 0.4068, "CCN": 0.4062}
    kept = rows_of(prepared("mmseqs-proteins", tmp_path / "mmseqs"))
    assert [row["id"] for _, row in kept] == ["good", "low"]
    assert 3 < kept[0][1]["isoelectric_point"] < 12


def test_a_clone_with_a_loader_script_is_read_by_its_table(tmp_path: Path) -> None:
    """`datasets` refuses a folder that holds a script of its own name."""
    clone = tmp_path / "binding_affinity"
    (affinities(tmp_path / "hub") / "default/train-00000-of-00001.parquet").rename(tmp_path / "all.parquet")
    (clone / "data").mkdir(parents=True)
    (tmp_path / "all.parquet").rename(clone / "data/all.parquet")
    (clone / "binding_affinity.py").write_text("raise SystemExit\n")
    data = prepare(recipe_of("binding-affinity"), clone, tmp_path / "cache")
    assert [row["smiles"] for _, row in rows_of(data)] == ["CCO", "CCN"]


def test_help_pages_are_aligned_by_paragraph(tmp_path: Path) -> None:
    data = prepare(recipe_of("libreoffice-help"), help_pages(tmp_path / "help"), tmp_path / "cache")
    ((split, row),) = rows_of(data)
    assert split is None
    assert row["en"] == "Opens the page of en." and row["el"] == "Opens the page of el."


def test_a_language_that_is_not_there_is_named(tmp_path: Path) -> None:
    import shutil

    folder = help_pages(tmp_path / "help")
    shutil.rmtree(folder / "el")
    with pytest.raises(UserError, match="has no el; all eight .* apt install libreoffice-help-el"):
        prepare(recipe_of("libreoffice-help"), folder, tmp_path / "cache")
    shutil.rmtree(next(folder / name for name in ("en-US", "en") if (folder / name).is_dir()))
    with pytest.raises(UserError, match="has no en el; .* apt install libreoffice-help-en-us libreoffice-help-el"):
        prepare(recipe_of("libreoffice-help"), folder, tmp_path / "cache")


def test_a_line_of_the_help_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    folder = help_tables(tmp_path / "help")
    table = next(iter(sorted(folder.glob("libreoffice_help.train.tsv*"))))
    text = gzip.decompress(table.read_bytes()).decode() + "cut off\tline\n"
    table.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UserError, match="line 3: 2 columns where the header has 8. Restore the file"):
        prepare(recipe_of("libreoffice-help"), folder, tmp_path / "cache")


def test_a_copy_of_the_hub_that_changed_is_read_anew(tmp_path: Path) -> None:
    """Which `datasets` does not see: it keeps the rows of a folder under its last name."""
    for number in (1, 2):
        folder = flores(tmp_path / f"{number}" / "copy")
        if number == 2:
            for file in folder.glob("*/dev-*.parquet"):
                pq.write_table(pa.Table.from_pylist([{"id": 7, "text": "another"}]), file)
        rows = rows_of(prepare(recipe_of("flores"), folder, tmp_path / "cache"))
        assert [row["en"] for split, row in rows if split == "valid"] == (
            ["sentence 1 in eng_Latn", "sentence 2 in eng_Latn"] if number == 1 else ["another"]
        )


def test_held_out_pairs_of_opus_are_not_trained_on(tmp_path: Path) -> None:
    by_split = {split: row["en"] for split, row in rows_of(prepared("opus100-en-fr", tmp_path))}
    assert by_split == {"test": "a", "valid": "b", "train": "c"}


def test_the_published_split_of_drugcomb_is_used_and_validation_shares_no_pair(tmp_path: Path) -> None:
    """It goes by ordered pairs: C with CO is trained on, CO with C tested."""
    origin, head = drugcomb(tmp_path / "origin"), "Drug1_ID,Drug1,Drug2_ID,Drug2,CellLine_ID,Y\n"
    drugs = ["C" * n + "O" for n in range(1, 15)]
    pairs = [f"{one},{one},{two},{two},HT29,1\n" for one in drugs for two in drugs if one != two]
    (origin / "train_val.csv").write_text(head + "".join(pairs))
    (origin / "test.csv").write_text(head + "".join(pairs[:20]))
    prepare(recipe_of("drugcomb-css"), origin, tmp_path / "cache")
    source = SourceConfig.model_validate({"recipe": "drugcomb-css", "template": "{key}"})
    table = load_rows(source, tmp_path / "cache").table
    splits = split_rows(table, table["key"][:], source, "here")
    train, valid, test = (
        {frozenset((table[int(at)]["smiles_1"], table[int(at)]["smiles_2"])) for at in splits[split]}
        for split in SPLITS
    )
    assert valid and not train & valid
    assert len(splits["test"]) == 20 and test <= train | valid, "as published"


def test_rows_of_another_version_are_prepared_anew(tmp_path: Path) -> None:
    recipe = recipe_of("drugcomb-css")
    prepare(recipe._replace(format=recipe.format - 1), drugcomb(tmp_path / "origin"), tmp_path)
    with pytest.raises(UserError, match="drugcomb-css: it is not prepared by this version, .*Run: tagllm prepare"):
        prepare(recipe, None, tmp_path)
    prepare(recipe, tmp_path / "origin", tmp_path)
    assert prepare(recipe, None, tmp_path).about["made_from"]["format"] == recipe.format


def test_preparing_again_does_nothing_and_other_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = davis(tmp_path / "origin")
    first = prepare(recipe_of("davis"), origin, tmp_path / "cache")
    written = first.files["train"].stat().st_mtime_ns
    assert prepare(recipe_of("davis"), origin, tmp_path / "cache").files["train"].stat().st_mtime_ns == written
    gzipped(origin / "davis.train.csv.gz", "drug_id,smiles,target_id,sequence,pKd,fold\n1,C,2,MK,5,4\n1,C,3,MK,6,0\n")
    assert prepare(recipe_of("davis"), origin, tmp_path / "cache").about["rows"] == {"train": 1, "test": 1}


def test_another_version_of_a_package_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydta")
    recipe = recipe_of("pydta-proteins")
    monkeypatch.setattr(preparing.metadata, "version", lambda _: "1")
    assert prepare(recipe, None, tmp_path).about["made_from"]["package"] == "pydta 1"
    monkeypatch.setattr(preparing.metadata, "version", lambda _: "2")
    assert prepare(recipe, None, tmp_path).about["made_from"]["package"] == "pydta 2"


def test_what_is_not_prepared_says_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe davis: it is not prepared.*tagllm prepare davis --from PATH"):
        load_rows(SourceConfig.model_validate({"recipe": "davis", "template": "{smiles}"}), tmp_path)


def test_damage_is_found(tmp_path: Path) -> None:
    data = prepared("davis", tmp_path)
    data.files["test"].write_bytes(data.files["test"].read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedFile, match="test.parquet: cannot be used: its sha256 is"):
        prepare(recipe_of("davis"), None, tmp_path / "cache")


@pytest.mark.parametrize("name", ["test.parquet", "recipe.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_what_is_damaged_is_written_anew_from_its_origin(
    name: str, damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    data = prepared("davis", tmp_path)
    whole = rows_of(data)
    damage(data.folder / name)
    again = prepare(recipe_of("davis"), tmp_path / "origin", tmp_path / "cache")
    assert rows_of(again) == whole and rows_of(prepare(recipe_of("davis"), None, tmp_path / "cache")) == whole


def test_a_damaged_copy_of_a_package_is_written_anew(tmp_path: Path) -> None:
    pytest.importorskip("pydta")
    data = prepare(recipe_of("pydta-proteins"), None, tmp_path)
    whole = rows_of(data)
    data.files[None].write_bytes(b"x")
    assert rows_of(prepare(recipe_of("pydta-proteins"), None, tmp_path)) == whole


def test_files_of_another_form_are_told(tmp_path: Path) -> None:
    gzipped(tmp_path / "davis.train.csv.gz", "drug,smiles\n1,CC\n")
    with pytest.raises(UserError, match="recipe davis: .* is not of the form that is read: KeyError"):
        prepare(recipe_of("davis"), tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "recipes").iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Drug1": None}, "TypeError.* behind 1 good rows. It must be the folder of the benchmark"),
        ({"Y": None}, "TypeError.*float"),
        ({"CellLine_ID": None}, "TypeError.'cell_line is None, not a str'"),
        ({"Drug1_ID": None}, "TypeError.'drug_1 is None, not a str'"),
        ({"Drug2": 7}, "TypeError"),
        ({"Y": "high"}, "ValueError.*'high'"),
    ],
)
def test_a_row_without_a_value_is_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"Drug1_ID": "a", "Drug1": "CC", "Drug2_ID": "b", "Drug2": "CO", "CellLine_ID": "HT29", "Y": 12.5}
    before = [good] * (None in change.values())  # a column has one type
    pq.write_table(pa.Table.from_pylist([*before, {**good, **change}]), tmp_path / "train_val.parquet")
    with pytest.raises(UserError, match=f"recipe drugcomb-css: .* is not of the form that is read: {message}"):
        prepare(recipe_of("drugcomb-css"), tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "recipes").iterdir()), "nothing is left behind"


def test_a_null_translation_is_told(tmp_path: Path) -> None:
    copy = opus(tmp_path / "copy")
    rows = [{"translation": {"en": "a", "fr": "b"}}, {"translation": {"en": None, "fr": "b"}}]
    pq.write_table(pa.Table.from_pylist(rows), copy / "en-fr" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="recipe opus100-en-fr: .* is not of the form that is read: TypeError"):
        prepare(recipe_of("opus100-en-fr"), copy, tmp_path / "cache")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "train_val.pkl").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match="is a pickle, which may run any code .*to_csv"):
        prepare(recipe_of("drugcomb-css"), tmp_path, tmp_path / "cache")


def test_the_command_that_a_pickle_is_answered_with_makes_files_that_are_read(tmp_path: Path) -> None:
    """As PyTDC writes them: pickles of both splits, with the expression of all genes in a column of its own."""
    pandas, origin = pytest.importorskip("pandas"), tmp_path / "drug comb"
    origin.mkdir()
    for at, stem in enumerate(("train_val", "test")):
        row = {"Drug1_ID": "a", "Drug1": "CC", "Drug2_ID": "b", "Drug2": "C" * (at + 2), "Cell_Line_ID": "HT29"}
        rows = [row | {"CellLine": [0.5] * 1000, "Y": 12.5}, row | {"Drug1": "CCO", "CellLine": [0.1] * 1000, "Y": 3.0}]
        pandas.DataFrame(rows).to_pickle(origin / f"{stem}.pkl")
    with pytest.raises(UserError) as caught:
        prepare(recipe_of("drugcomb-css"), origin, tmp_path / "cache")
    (told,) = caught.value.problems
    command = told.partition("If you trust it: ")[2].replace(" python ", f" {sys.executable} ")
    subprocess.run(["bash", "-c", command], check=True, timeout=100)
    assert (origin / "test.csv").stat().st_size < 1000
    rows = rows_of(prepare(recipe_of("drugcomb-css"), origin, tmp_path / "cache"))
    assert [(split, row["css"]) for split, row in rows] == [
        ("train", 12.5), ("train", 3.0), ("test", 12.5), ("test", 3.0),
    ]  # fmt: skip


def test_the_descriptor_is_that_of_the_authors_code(tmp_path: Path) -> None:
    """BLOSUM1, as peptides 0.3.2 gave it for these; the first descriptor of later versions is another one."""
    pytest.importorskip("peptides")
    fasta = f">a\n{PROTEIN}\n>b\n{'ACDEFGHIKLMNPQRSTVWY' * 2}\n"
    gzipped(tmp_path / "DB.fasta.gz", fasta)
    rows = rows_of(prepare(recipe_of("mmseqs-proteins"), tmp_path, tmp_path / "cache"))
    assert [row["descriptor"] for _, row in rows] == pytest.approx([0.10545454545454547, 0.048], abs=1e-9)


def test_the_command_lists_and_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGLLM_CACHE", str(tmp_path / "cache"))
    origin = davis(tmp_path / "origin")
    shown = RUNNER.invoke(app, ["prepare", "davis", "--from", str(origin)])
    assert shown.exit_code == 0, shown.stderr
    about = json.loads((tmp_path / "cache/recipes/davis/recipe.json").read_text())
    assert "licence  none stated; published with DeepDTA" in shown.stdout and "train 16, test 4" in shown.stdout
    assert about["sha256"]["train.parquet"] in shown.stdout
    again = RUNNER.invoke(app, ["prepare", "davis"])
    assert again.exit_code == 0 and again.stdout == shown.stdout, "what is there needs no --from"
    listed = RUNNER.invoke(app, ["prepare"])
    assert all(name in listed.stdout for name in RECIPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["davis"], "it is not prepared, .* Run: tagllm prepare davis --from PATH"),
        (["davis", "--from", "nowhere"], "--from nowhere: there is no such file or folder"),
        (["davies"], "'davies' is no named data set"),
        (["rdkit-nci", "--from", "/etc/hostname"], "--from /etc/hostname would not be read: .* package rdkit. Run: "),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAGLLM_CACHE", str(tmp_path))
    result = RUNNER.invoke(app, ["prepare", *arguments])
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data in ../shared/data")
@pytest.mark.parametrize(
    ("name", "folder", "rows"),
    [
        ("davis", "affinity", 25_046),
        ("oneil", "synergy", 17_259 + 834 + 2_721),
        ("libreoffice-help", "translation", 9_279 + 369 + 533),
    ],
)
def test_the_real_files(name: str, folder: str, rows: int, tmp_path: Path) -> None:
    data = prepare(recipe_of(name), SHARED / folder, tmp_path)
    assert sum(data.about["rows"].values()) == rows
    if name == "davis":
        found = rows_of(data)
        pairs = {split: [(row["smiles"], row["sequence"]) for of, row in found if of == split] for split in SPLITS}
        trained_on = set(pairs["train"])
        again = sum(pair in trained_on for pair in pairs["test"])
        assert f"{again} of the {len(pairs['test']):,} rows of test" in data.about["description"]
