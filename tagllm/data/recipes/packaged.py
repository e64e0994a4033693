"""Named data sets that pip brings: real rows for the quickstart and the tests, without a download."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tagllm.config import Split
from tagllm.data.recipes.labels import drug_likeness
from tagllm.data.recipes.recipe import Recipe, RecipeRow, pair_key
from tagllm.errors import UserError


def _packaged(recipe: str, package: str, path: str, requirement: str) -> Path:
    """A data file below an installed package, found without importing it."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    what = f"package {package} has no {path}" if folders else f"package {package} is not installed"
    raise UserError(f"recipe {recipe}: {what}; the rows are read from there. Run: pip install {requirement}")


def _rdkit_nci(origin: Path | None) -> Iterator[RecipeRow]:
    path = _packaged("rdkit-nci", "rdkit", "Data/NCI/first_5K.smi", "rdkit==2026.9.1")
    seen: set[str] = set()
    for line in path.read_text().splitlines():
        smiles = line.split()[0]
        found = drug_likeness(smiles)
        if found and found.canonical not in seen:
            seen.add(found.canonical)
            yield None, {"smiles": smiles, "key": found.canonical, "qed": found.qed}


def _pydta_pairs(recipe: str) -> Iterator[tuple[Split, str, str, float]]:
    path = _packaged(recipe, "pydta", "data/dta_sample_data/dta_sample_data.json", "--no-deps pydta==0.0.3")
    splits = json.loads(path.read_text())
    names: dict[str, Split] = {"train": "train", "val": "valid", "test": "test"}
    for theirs, split in names.items():
        for smiles, sequence, affinity in zip(*splits[theirs], strict=True):
            yield split, smiles, sequence, float(affinity)


def _pydta(origin: Path | None) -> Iterator[RecipeRow]:
    for split, smiles, sequence, affinity in _pydta_pairs("pydta"):
        key = pair_key(smiles, sequence)
        yield split, {"smiles": smiles, "sequence": sequence, "affinity": affinity, "key": key}


def _pydta_proteins(origin: Path | None) -> Iterator[RecipeRow]:
    for sequence in dict.fromkeys(sequence for _, _, sequence, _ in _pydta_pairs("pydta-proteins")):
        yield None, {"sequence": sequence, "key": pair_key(sequence)}


def _molsets(origin: Path | None) -> Iterator[RecipeRow]:
    import csv

    files: dict[str, Split] = {"train.csv.gz": "train", "test.csv.gz": "test"}
    for name, split in files.items():
        path = _packaged("molsets", "moses", f"dataset/data/{name}", "--no-deps molsets==0.3.1")
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                yield split, {"smiles": row["SMILES"], "key": row["SMILES"]}


RECIPES = (
    Recipe(
        "rdkit-nci",
        "NCI molecules with their drug-likeness (QED), computed exactly by rdkit; one row per canonical SMILES, "
        "which is the key; the SMILES that rdkit cannot parse are left out",
        "BSD-3-Clause (rdkit)",
        "package rdkit",
        {"smiles": str, "key": str, "qed": float},
        _rdkit_nci,
        "rdkit",
    ),
    Recipe(
        "pydta",
        "drug-target affinities of ligand-protein pairs with the splits of the package; no pair stands in two of "
        "them, so none is dropped; ligands and proteins do recur; most affinities are a censored floor of 5.0",
        "MIT (pydta)",
        "package pydta",
        {"smiles": str, "sequence": str, "affinity": float, "key": str},
        _pydta,
        "pydta",
    ),
    Recipe(
        "pydta-proteins",
        "the different protein sequences of pydta, unlabelled; no splits of their own",
        "MIT (pydta)",
        "package pydta",
        {"sequence": str, "key": str},
        _pydta_proteins,
        "pydta",
    ),
    Recipe(
        "molsets",
        "1.58 million drug-like molecules for training and 176 thousand to test on (Polykovskiy et al. 2020)",
        "MIT (molsets)",
        "package molsets",
        {"smiles": str, "key": str},
        _molsets,
        "molsets",
    ),
)
