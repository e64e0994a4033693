"""Named data sets made from files that people have or can fetch: `tagllm prepare NAME --from PATH`.

PyTDC 1.1.15 cannot be installed beside us (it needs numpy < 2, pandas < 3 and datasets < 2.20), so the files of its
benchmark groups are read here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagllm.config import Split
from tagllm.data.recipes import libreoffice
from tagllm.data.recipes.labels import RESIDUES, protein_labels
from tagllm.data.recipes.recipe import Recipe, RecipeRow, file_in, pair_key, whole_rows
from tagllm.errors import UserError

SHORTEST, LONGEST = 30, 512
"""Residues of a protein of `mmseqs-proteins`."""
PEPTIDE = 3, 10
"""Residues of one of `peptides`."""
_TRAIN_TEST: dict[str, Split] = {"train_val": "train", "test": "test"}


def _davis(origin: Path | None) -> Iterator[RecipeRow]:
    path = file_in("davis", origin, "davis.train.csv.gz", "davis.train.csv")
    for row in whole_rows(path):
        yield "test" if row["fold"] == "4" else "train", {
            "smiles": row["smiles"], "sequence": row["sequence"], "drug": row["drug_id"], "target": row["target_id"],
            "affinity": float(row["pKd"]), "key": pair_key(row["drug_id"], row["target_id"]),
        }  # fmt: skip


def _oneil(origin: Path | None) -> Iterator[RecipeRow]:
    splits: tuple[Split, ...] = ("train", "valid", "test")
    for split in splits:
        for row in whole_rows(file_in("oneil", origin, f"oneil.{split}.csv.gz", f"oneil.{split}.csv")):
            yield split, {
                **{name: row[name] for name in ("drug_1", "smiles_1", "drug_2", "smiles_2", "cell_line")},
                "synergy": float(row["synergy_loewe"]), "key": pair_key(*sorted((row["drug_1"], row["drug_2"]))),
            }  # fmt: skip


def _mmseqs_proteins(origin: Path | None) -> Iterator[RecipeRow]:
    seen: set[str] = set()
    for row in whole_rows(file_in("mmseqs-proteins", origin, "DB.fasta.gz", "DB.fasta")):
        sequence = row["sequence"].upper()
        if not SHORTEST <= len(sequence) <= LONGEST or not set(sequence) <= RESIDUES or sequence in seen:
            continue
        seen.add(sequence)
        labels = protein_labels("mmseqs-proteins", sequence)
        yield None, {"id": row["id"], "sequence": sequence, **labels, "key": pair_key(sequence)}


def _peptides(origin: Path | None) -> Iterator[RecipeRow]:
    """The beginning of each protein as a sequence and as a molecule, so that a property of both can be asked either
    way."""
    from rdkit import Chem
    from rdkit.Chem import rdMolDescriptors

    seen: set[str] = set()
    for row in whole_rows(file_in("peptides", origin, "DB.fasta.gz", "DB.fasta")):
        digits = hashlib.sha256(row["sequence"].encode()).digest()
        sequence = row["sequence"].upper()[1 : 1 + PEPTIDE[0] + digits[0] % (PEPTIDE[1] - PEPTIDE[0] + 1)]
        if len(sequence) < PEPTIDE[0] or not set(sequence) <= RESIDUES or sequence in seen:
            continue
        seen.add(sequence)
        molecule = Chem.MolFromSequence(sequence)
        yield None, {
            "sequence": sequence, "smiles": Chem.MolToSmiles(molecule, isomericSmiles=False),
            "weight": float(rdMolDescriptors._CalcMolWt(molecule)), "key": pair_key(sequence),
        }  # fmt: skip


def _benchmark(recipe: str, origin: Path | None, stem: str) -> Path:
    """A file of a TDC benchmark group. Pickles run code when they are opened, so we open none."""
    if origin is not None and (origin / f"{stem}.pkl").is_file() and not list(origin.glob(f"{stem}.[cp][sa]*")):
        raise UserError(
            f"recipe {recipe}: {origin / stem}.pkl is a pickle, which may run any code when opened; rows come from "
            f"csv. If you trust it: (cd '{origin}' && python -c \"import pandas as p, pathlib; [p.read_pickle(f).drop("
            "columns='CellLine', errors='ignore').to_csv(f.with_suffix('.csv'), index=False) for f in "
            "pathlib.Path().glob('*.pkl')]\")"
        )
    return file_in(recipe, origin, f"{stem}.csv", f"{stem}.csv.gz", f"{stem}.parquet")


def _bindingdb_patent(origin: Path | None) -> Iterator[RecipeRow]:
    for stem, split in _TRAIN_TEST.items():
        for row in whole_rows(_benchmark("bindingdb-patent", origin, stem)):
            yield split, {
                "smiles": row["Drug"], "sequence": row["Target"], "affinity": float(row["Y"]),
                "year": int(float(row["Year"])), "key": f"{pair_key(row['Drug'], row['Target'])}/{split}",
            }  # fmt: skip


def _name(value: Any) -> str | None:
    """Some are numbers; none is left to be found missing."""
    return None if value is None else str(value)


def _drugcomb_css(origin: Path | None) -> Iterator[RecipeRow]:
    for stem, split in _TRAIN_TEST.items():
        for row in whole_rows(_benchmark("drugcomb-css", origin, stem)):
            yield split, {
                "drug_1": _name(row["Drug1_ID"]), "smiles_1": row["Drug1"],
                "drug_2": _name(row["Drug2_ID"]), "smiles_2": row["Drug2"], "css": float(row["Y"]),
                "cell_line": _name(row["CellLine_ID" if "CellLine_ID" in row else "Cell_Line_ID"]),
                "key": f"{pair_key(*sorted((row['Drug1'], row['Drug2'])))}/{split}",
            }  # fmt: skip


RECIPES = (
    Recipe(
        "davis",
        "kinase affinities (pKd) of 68 drugs and 379 sequences (Davis et al. 2011), DeepDTA's training folds of "
        "setting 1: folds 0 to 3 are train, fold 4 is test (the published test fold is not in the file); the 442 "
        "targets share these sequences, so 791 of the 5,009 rows of test have the drug and sequence of a row of train",
        "none stated; published with DeepDTA for research",
        "https://github.com/hkmztrk/DeepDTA",
        {"smiles": str, "sequence": str, "drug": str, "target": str, "affinity": float, "key": str},
        _davis,
        origin="a folder with davis.train.csv.gz (drug_id, smiles, target_id, sequence, pKd: -log10 of Kd in mol/l, "
        "and fold: DeepDTA's five training folds, from 0)",
    ),
    Recipe(
        "oneil",
        "Loewe synergy of 38 drugs in pairs on 39 cell lines (O'Neil et al. 2016); no pair of drugs is in two splits",
        "none stated; published with DeepSynergy for research",
        "https://github.com/AstraZeneca/chemicalx",
        {
            "drug_1": str, "smiles_1": str, "drug_2": str, "smiles_2": str, "cell_line": str, "synergy": float,
            "key": str,
        },
        _oneil,
        origin="a folder with oneil.{train,valid,test}.csv.gz (drug_1, smiles_1, drug_2, smiles_2, cell_line, "
        "synergy_loewe), no pair of drugs in two of them",
    ),
    Recipe(
        "mmseqs-proteins",
        f"UniProt proteins of {SHORTEST} to {LONGEST} standard residues, each once, with BLOSUM1 (the paper's "
        "descriptor) and the isoelectric point",
        "CC BY 4.0 (UniProt)",
        "Debian package mmseqs2-examples",
        {"id": str, "sequence": str, "descriptor": float, "isoelectric_point": float, "key": str},
        _mmseqs_proteins,
        "peptides",
        origin="DB.fasta.gz, or its folder (/usr/share/doc/mmseqs2/example-data)",
        format=2,
    ),
    Recipe(
        "peptides",
        f"beginnings of UniProt proteins, {PEPTIDE[0]} to {PEPTIDE[1]} residues behind the first, each once, as "
        "sequence and as SMILES without stereochemistry, with their molecular weight in g/mol",
        "CC BY 4.0 (UniProt)",
        "Debian package mmseqs2-examples",
        {"sequence": str, "smiles": str, "weight": float, "key": str},
        _peptides,
        "rdkit",
        origin="DB.fasta.gz, or its folder (/usr/share/doc/mmseqs2/example-data)",
    ),
    Recipe(
        "libreoffice-help",
        "the same paragraph in eight languages, split by its English text",
        "MPL-2.0 (LibreOffice)",
        "Debian packages libreoffice-help-*",
        {**dict.fromkeys(libreoffice.LANGUAGES, str), "key": str},
        libreoffice.rows,
        origin="a folder with libreoffice_help.{train,valid,test}.tsv.gz, or the installed help "
        "(/usr/share/libreoffice/help)",
    ),
    Recipe(
        "bindingdb-patent",
        "affinities of patents, TDC's benchmark dti_dg: trained on older patents than it is tested on; a pair that is "
        "measured again in a later patent may be in both, as published",
        "CC BY 4.0 (BindingDB, TDC)",
        "https://tdcommons.ai/benchmark/dti_dg_group/bindingdb_patent",
        {"smiles": str, "sequence": str, "affinity": float, "year": int, "key": str},
        _bindingdb_patent,
        origin="the folder of the benchmark, with train_val.csv and test.csv",
    ),
    Recipe(
        "drugcomb-css",
        "sensitivity scores (CSS) of pairs of drugs on cell lines, TDC's benchmark drugcombo; it is split by ordered "
        "pairs, so drug A with B may be in train and B with A in test, as published; what is taken out of train to "
        "validate on shares no pair with the rest, in either order",
        "CC BY-NC-SA 4.0 (DrugComb, TDC)",
        "https://tdcommons.ai/benchmark/drugcombo_group/drugcomb_css",
        {
            "drug_1": str, "smiles_1": str, "drug_2": str, "smiles_2": str, "cell_line": str, "css": float, "key": str,
        },
        _drugcomb_css,
        origin="the folder of the benchmark, with train_val and test as .csv or .parquet",
        format=3,
    ),
)  # fmt: skip
