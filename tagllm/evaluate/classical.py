"""Baselines that see the fields as they are and no LLM, on the same rows: means per value, the nearest training row,
ridge and boosted trees on fingerprints.

n rows, U distinct values of a field, F features, K targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Fields = Mapping[str, Sequence[str]]
Kind = Literal["molecule", "sequence", "category"]
BITS, RADIUS, LETTERS = 1024, 2, 3
"""Morgan fingerprints of this size and radius; runs of so many letters hashed into as many bits."""
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
MANY, RESIDUES = 50, frozenset("ACDEFGHIKLMNPQRSTVWY")
"""So many distinct words of these letters are peptides rather than names."""
HELD_BACK = 0.2
"""Of the training rows, to choose a penalty by."""


class Field(NamedTuple):
    """One column of training and held-out rows together."""

    kind: Kind
    bits_UF: Any
    """Sparse 0/1; one column per value for a category."""
    train_n: NDArray[np.intp]
    held_out_n: NDArray[np.intp]
    """Which distinct value stands in each row."""


def classical_baselines(train: Fields, targets_nK: Floats, held_out: Fields) -> dict[str, Floats]:
    """What each baseline answers to the held-out rows (n, K). `field_means` (an additive effect per value of each
    field) is left out where values hardly recur."""
    fields = [_field(train[name], held_out[name]) for name in train]
    predictions = {"nearest_row": targets_nK[_nearest(fields)]}
    if any(len(np.unique(f.train_n)) < len(f.train_n) / 2 for f in fields):
        recurring = [f for f in fields if len(np.unique(f.train_n)) < len(f.train_n) / 2]
        predictions["field_means"] = _ridge(*_columns(recurring, categories=True), targets_nK)
    seen_nF, unseen_nF = _columns(fields)
    predictions["ridge_fingerprints"] = _ridge(seen_nF, unseen_nF, targets_nK)
    predictions["boosting_fingerprints"] = _boosting(seen_nF, unseen_nF, targets_nK)
    return {name: values.astype(np.float32) for name, values in predictions.items()}


def kind_of(values: Sequence[str]) -> Kind:
    """Of distinct values: what rdkit can read is a molecule, long words of capital letters are sequences, and so are
    many short ones of the letters of amino acids."""
    from rdkit import Chem, rdBase

    some = list(values)[:200]
    if sum(len(v) >= 20 and v.isalpha() and v.isupper() for v in some) > 0.9 * len(some):
        return "sequence"
    with rdBase.BlockLogs():
        readable = sum(bool(v) and Chem.MolFromSmiles(v) is not None for v in some)
    if readable > 0.9 * len(some):
        return "molecule"
    peptides = sum(len(v) >= LETTERS and set(v) <= RESIDUES for v in some)
    return "sequence" if len(some) >= MANY and peptides > 0.9 * len(some) else "category"


def _field(train: Sequence[str], held_out: Sequence[str]) -> Field:
    distinct, at = np.unique(np.array([*train, *held_out], dtype=object).astype(str), return_inverse=True)
    kind = kind_of(list(distinct))
    return Field(kind, _bits(list(distinct), kind), at[: len(train)], at[len(train) :])


def _bits(values: Sequence[str], kind: Kind) -> Any:
    from scipy.sparse import csr_matrix, identity

    if kind == "category":
        return identity(len(values), np.float32, format="csr")
    if kind == "sequence":
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(
            analyzer="char", ngram_range=(LETTERS, LETTERS), n_features=BITS, binary=True, norm=None,
            alternate_sign=False, lowercase=False, dtype=np.float32,
        ).transform(values)  # fmt: skip
    from rdkit import Chem, rdBase
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    generator = GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    with rdBase.BlockLogs():
        molecules = [Chem.MolFromSmiles(value) for value in values]
    nothing = np.zeros(BITS, np.float32)
    return csr_matrix(
        [nothing if m is None else generator.GetFingerprintAsNumPy(m).astype(np.float32) for m in molecules]
    )


def _columns(fields: Sequence[Field], categories: bool = False) -> tuple[Any, Any]:
    """Features of training and of held-out rows; `categories` takes each value as it is."""
    from scipy.sparse import hstack, identity

    blocks = [identity(f.bits_UF.shape[0], np.float32, format="csr") if categories else f.bits_UF for f in fields]
    train = hstack([block[f.train_n] for block, f in zip(blocks, fields, strict=True)], format="csr")
    held_out = hstack([block[f.held_out_n] for block, f in zip(blocks, fields, strict=True)], format="csr")
    return train, held_out


def _nearest(fields: Sequence[Field]) -> NDArray[np.intp]:
    """For each held-out row the training row that is most alike: Tanimoto similarity, averaged over the fields."""
    tables = [_tanimoto(f.bits_UF, np.unique(f.held_out_n)) for f in fields]
    best = []
    for at in range(len(fields[0].held_out_n)):
        alike_n = sum(table[f.held_out_n[at]][f.train_n] for table, f in zip(tables, fields, strict=True))
        best.append(int(np.argmax(alike_n)))
    return np.array(best, np.intp)


def _tanimoto(bits_UF: Any, wanted: NDArray[np.intp]) -> dict[int, Floats]:
    """Similarity of each wanted value to all values."""
    size_U = np.asarray(bits_UF.sum(axis=1)).ravel()
    found: dict[int, Floats] = {}
    for start in range(0, len(wanted), 256):
        some = wanted[start : start + 256]
        both = (bits_UF[some] @ bits_UF.T).toarray()
        union = size_U[some][:, None] + size_U[None] - both
        found |= dict(zip(some.tolist(), both / np.maximum(union, 1), strict=True))
    return found


def _ridge(seen_nF: Any, unseen_nF: Any, targets_nK: Floats) -> Floats:
    """The penalty is chosen on a fifth of the training rows."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import train_test_split

    part = train_test_split(np.arange(len(targets_nK)), test_size=HELD_BACK, random_state=0)

    def error(penalty: float) -> float:
        fit = Ridge(alpha=penalty, solver="sparse_cg").fit(seen_nF[part[0]], targets_nK[part[0]])
        return float(
            np.mean((fit.predict(seen_nF[part[1]]).reshape(-1, targets_nK.shape[1]) - targets_nK[part[1]]) ** 2)
        )

    best = min(PENALTIES, key=error)
    predicted: Floats = Ridge(alpha=best, solver="sparse_cg").fit(seen_nF, targets_nK).predict(unseen_nF)
    return predicted.reshape(-1, targets_nK.shape[1])


def _boosting(seen_nF: Any, unseen_nF: Any, targets_nK: Floats) -> Floats:
    """Histogram-based gradient boosting, stopped early on a tenth of the training rows."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    seen, unseen = seen_nF.toarray(), unseen_nF.toarray()
    columns = []
    for target_n in targets_nK.T:
        model = HistGradientBoostingRegressor(max_iter=300, early_stopping=True, random_state=0)
        columns.append(model.fit(seen, target_n).predict(unseen))
    return np.stack(columns, axis=1)
