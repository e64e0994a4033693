"""Named data sets of the Hugging Face hub; `--from FOLDER` reads a local copy of the hub's repository instead."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tagllm.config import Split
from tagllm.data.recipes.labels import drug_likeness, protein_labels
from tagllm.data.recipes.recipe import Recipe, RecipeRow, pair_key
from tagllm.errors import UserError

LANGUAGES = {"fr": "en-fr", "ru": "en-ru", "de": "de-en", "it": "en-it", "el": "el-en", "es": "en-es", "pt": "en-pt"}
"""OPUS-100's configs, by the language beside English."""
FLORES = {
    "en": "eng_Latn", "fr": "fra_Latn", "ru": "rus_Cyrl", "de": "deu_Latn", "it": "ita_Latn", "el": "ell_Grek",
    "es": "spa_Latn", "pt": "por_Latn",
}  # fmt: skip


def load_hub(name: str, config: str | None, **options: str) -> Any:
    """`datasets.load_dataset`, with further `options`.

    Raises:
        UserError: whatever keeps it from being loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, **options)
    except Exception as error:  # noqa: BLE001 - whatever a hub client, a network or a stranger's data set may raise
        mode = "on (HF_HUB_OFFLINE)" if datasets.config.HF_HUB_OFFLINE else "off"
        raise UserError(
            f"hub {name}{f':{config}' if config else ''}: cannot be loaded: {type(error).__name__}: {error}; offline "
            f"mode is {mode}. Check the name, load it once on a machine with a network, or give the rows as a file "
            "with `path:`."
        ) from None


def _loaded(repository: str, origin: Path | None, config: str | None, **options: str) -> Any:
    """`options` are those of the hub. Of a folder `datasets` keeps rows under its last name, whatever is in it."""
    if origin is None:
        return load_hub(repository, config, **options)
    return load_hub(str(origin), config, download_mode="force_redownload", verification_mode="no_checks")


def _opus100(language: str, origin: Path | None) -> Iterator[RecipeRow]:
    """Pairs of the held-out splits are taken out of train, where OPUS-100 repeats some of them."""
    splits = _loaded("Helsinki-NLP/opus-100", origin, LANGUAGES[language])
    held_out: set[str] = set()
    names: dict[str, Split] = {"test": "test", "validation": "valid", "train": "train"}
    for theirs, split in names.items():
        for row in splits[theirs]:
            pair = row["translation"]
            key = pair_key(pair["en"], pair[language])
            if key in held_out or not pair["en"].strip() or not pair[language].strip():
                continue
            if split != "train":
                held_out.add(key)
            yield split, {"en": pair["en"], language: pair[language], "key": key}


def _flores(origin: Path | None) -> Iterator[RecipeRow]:
    tables = {language: _loaded("openlanguagedata/flores_plus", origin, name) for language, name in FLORES.items()}
    names: dict[str, Split] = {"dev": "valid", "devtest": "test"}
    for theirs, split in names.items():
        by_id = {language: {row["id"]: row["text"] for row in table[theirs]} for language, table in tables.items()}
        for name in by_id["en"]:
            if all(name in texts for texts in by_id.values()):
                yield split, {**{language: texts[name] for language, texts in by_id.items()}, "key": f"{theirs}/{name}"}


def _binding_affinity(origin: Path | None) -> Iterator[RecipeRow]:
    """Of the hub's own copy as parquet, or the table in a clone: the repository has a loader script, which is not
    run any more."""
    if origin is not None and (table := origin / "data" / "all.parquet").is_file():
        splits = load_hub("parquet", None, data_files=str(table), download_mode="force_redownload")
    else:
        splits = _loaded("jglaser/binding_affinity", origin, None, revision="refs/convert/parquet")
    for row in splits["train"]:
        smiles = row.get("smiles_can") or row["smiles"]
        yield None, {
            "sequence": row["seq"], "smiles": smiles, "affinity": float(row["neg_log10_affinity_M"]),
            "key": pair_key(smiles, row["seq"]),
        }  # fmt: skip


def _each_once(column: str, origin: Path | None) -> Iterator[str]:
    """One that is measured often would be most of what a tag learns."""
    seen: set[str] = set()
    for _, row in _binding_affinity(origin):
        if row[column] and row[column] not in seen:
            seen.add(row[column])
            yield row[column]


def _proteins(origin: Path | None) -> Iterator[RecipeRow]:
    for sequence in _each_once("sequence", origin):
        labels = protein_labels("binding-affinity-proteins", sequence)
        yield None, {"sequence": sequence, **labels, "key": pair_key(sequence)}


def _molecules(origin: Path | None) -> Iterator[RecipeRow]:
    for smiles in _each_once("smiles", origin):
        if found := drug_likeness(smiles):
            yield None, {"smiles": smiles, "qed": found.qed, "key": pair_key(smiles)}


RECIPES = (
    *(
        Recipe(
            f"opus100-en-{language}",
            f"English and {language.upper()} sentences that translate each other (OPUS-100), without those pairs "
            "of train that are held out too",
            "none of its own: that of each corpus in OPUS (see the data set's card)",
            "hub Helsinki-NLP/opus-100",
            {"en": str, language: str, "key": str},
            partial(_opus100, language),
        )
        for language in LANGUAGES
    ),
    Recipe(
        "flores",
        "1,012 sentences to test on and 997 to validate on in eight languages (FLORES+), no training rows",
        "CC BY-SA 4.0 (OLDI)",
        "hub openlanguagedata/flores_plus (accept its terms, then: hf auth login)",
        {**dict.fromkeys(FLORES, str), "key": str},
        _flores,
    ),
    Recipe(
        "binding-affinity",
        "1.9 million affinities (-log10 of mol/l) of ligand-protein pairs from BindingDB, PDBbind, BioLIP and others",
        "none of its own: that of each source (see the data set's card)",
        "hub jglaser/binding_affinity",
        {"sequence": str, "smiles": str, "affinity": float, "key": str},
        _binding_affinity,
    ),
    Recipe(
        "binding-affinity-proteins",
        "the proteins of binding-affinity, each once, with BLOSUM1 (the paper's descriptor) and the isoelectric point",
        "none of its own: that of each source (see the data set's card)",
        "hub jglaser/binding_affinity",
        {"sequence": str, "descriptor": float, "isoelectric_point": float, "key": str},
        _proteins,
        format=3,
    ),
    Recipe(
        "binding-affinity-molecules",
        "the molecules of binding-affinity that rdkit can parse, each once, with their drug-likeness (QED)",
        "none of its own: that of each source (see the data set's card)",
        "hub jglaser/binding_affinity",
        {"smiles": str, "qed": float, "key": str},
        _molecules,
        format=2,
    ),
)
