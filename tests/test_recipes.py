"""The recipes against the packages they read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from tagllm.config import Split
from tagllm.data.recipes import RECIPES, packaged, pair_key, recipe_of
from tagllm.errors import UserError

Rows = list[tuple[Split | None, dict[str, Any]]]


@pytest.fixture(scope="module")
def pairs() -> Rows:
    pytest.importorskip("pydta")
    return list(RECIPES["pydta"].rows(None))


@pytest.mark.parametrize("name", [recipe.name for recipe in packaged.RECIPES])
def test_rows_have_the_declared_columns_and_types(name: str) -> None:
    recipe = recipe_of(name)
    if find_spec({"molsets": "moses"}.get(recipe.package, recipe.package)) is None:
        pytest.skip(f"needs the package {recipe.package}")
    for _, values in itertools.islice(recipe.rows(None), 50):
        assert {column: type(value) for column, value in values.items()} == recipe.columns


def test_nci_is_unique_canonical_and_exact(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from rdkit.Chem import QED

    qed: Callable[[Chem.Mol], float] = QED.qed
    capfd.readouterr()
    rows = list(itertools.islice(RECIPES["rdkit-nci"].rows(None), 400))
    assert "".join(capfd.readouterr()) == ""
    keys = [values["key"] for _, values in rows]
    assert len(set(keys)) == len(keys)
    assert {split for split, _ in rows} == {None}
    for _, values in rows[::100]:
        molecule = Chem.MolFromSmiles(values["smiles"])
        assert Chem.MolToSmiles(molecule) == values["key"]
        assert values["qed"] == qed(molecule)


def test_nci_leaves_out_the_unparseable_and_the_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pytest.importorskip("rdkit")
    (tmp_path / "few.smi").write_text("CCO\t1\nnonsense\t2\nOCC\t3\nC1CC\t4\nCCN\t5\n")
    monkeypatch.setattr(packaged, "_packaged", lambda *_: tmp_path / "few.smi")
    assert [values["smiles"] for _, values in RECIPES["rdkit-nci"].rows(None)] == ["CCO", "CCN"]


def test_pydta_has_its_own_splits_without_overlap(pairs: Rows) -> None:
    counts = {split: sum(given == split for given, _ in pairs) for split in ("train", "valid", "test")}
    assert counts == {"train": 3000, "valid": 1000, "test": 1000}
    where = {(values["smiles"], values["sequence"]): split for split, values in pairs}
    assert len(where) == len({values["key"] for _, values in pairs}) == len(pairs)


def test_pydta_values(pairs: Rows) -> None:
    affinities = [values["affinity"] for _, values in pairs]
    assert (round(min(affinities), 2), max(affinities)) == (1.96, 12.0)
    assert sum(value == 5.0 for value in affinities) / len(pairs) == pytest.approx(0.64, abs=0.01)


def test_pydta_proteins_are_the_proteins_of_the_pairs_once(pairs: Rows) -> None:
    rows = [values for _, values in RECIPES["pydta-proteins"].rows(None)]
    assert {values["sequence"] for values in rows} == {values["sequence"] for _, values in pairs}
    assert len(rows) == len({values["key"] for values in rows}) == 388


def test_pair_keys_tell_parts_apart() -> None:
    assert pair_key("ab", "c") != pair_key("a", "bc")
    assert pair_key("CCO", "MAL") == "55b9ec19b8ba7a9a"


@pytest.mark.parametrize(
    ("name", "requirement"), [("rdkit-nci", "rdkit"), ("pydta", "--no-deps pydta==0.0.3"), ("pydta-proteins", "pydta")]
)
def test_a_missing_package_says_how_to_install_it(name: str, requirement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"recipe {name}: package .* is not installed.*pip install .*{requirement}"):
        next(RECIPES[name].rows(None))


def test_a_package_without_the_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="recipe pydta: package json has no data/none.json; .*pip install pydta"):
        packaged._packaged("pydta", "json", "data/none.json", "pydta==0.0.3")


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match="recipe: 'rdkit_nci' is no named.*Did you mean rdkit-nci?"):
        recipe_of("rdkit_nci")
