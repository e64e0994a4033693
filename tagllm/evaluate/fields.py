"""Columns of a table as numbers, for baselines that see no LLM: bits by which values are alike, and what is fitted.

n rows, C columns, U distinct values of a field, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagllm.data.recipes.labels import RESIDUES

Columns = Sequence[Sequence[str]]
Kind = Literal["molecule", "sequence", "number", "level", "category"]
"""A level is a number that recurs, as a temperature or a dose does: near others, and a value of its own."""
BITS, RADIUS, LETTERS = 1024, 2, 3
"""Morgan fingerprints of this size and radius; runs of so many letters hashed into as many bits, and shorter ones
counted."""
MANY = 50
"""So many distinct words of the letters of residues are peptides rather than names."""
FEW = 10
"""Numbers that recur are levels where there are more distinct ones, else categories."""
STEPS = 64
"""Of the ladder that tells how near numbers are."""


class Field(NamedTuple):
    """One column of training, validation and held-out rows together, or columns that may trade places."""

    kind: Kind
    values: list[str]
    """The distinct ones (U)."""
    bits_UF: Any
    """Sparse 0/1, by which values are alike; one column per value for a category and, among others, for a level."""
    features_UF: Any
    """What is fitted: these bits, and of a sequence how often it has each letter and pair of letters."""
    train_nC: NDArray[np.intp]
    valid_nC: NDArray[np.intp]
    held_out_nC: NDArray[np.intp]
    """Which distinct values stand in each row."""

    @property
    def recurs(self) -> bool:
        return len(self.trained) < self.train_nC.size / 2

    @property
    def trained(self) -> set[str]:
        """The values of training rows."""
        return {self.values[at] for at in np.unique(self.train_nC)}


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


def field_of(train: Columns, valid: Columns, held_out: Columns) -> Field:
    """Of what is neither molecules nor sequences, numbers are taken as numbers (a few that recur as categories), and
    other values that hardly recur as text, which is letters and runs of them like a sequence."""
    lengths = [len(columns[0]) for columns in (train, valid, held_out)]
    together = [[value for columns in parts for value in columns] for parts in zip(train, valid, held_out, strict=True)]
    distinct = sorted({value for column in together for value in column})
    number_of = {value: number for number, value in enumerate(distinct)}
    at_nC = np.array([[number_of[value] for value in column] for column in together], np.intp).T
    kind = kind_of(distinct)
    if kind == "category":
        kind = _kind_of_words(distinct, recur=len(distinct) <= at_nC.size / 2)
    bits_UF = _bits(distinct, kind)
    features_UF = _features(distinct, kind, bits_UF)
    return Field(kind, distinct, bits_UF, features_UF, *np.split(at_nC, np.cumsum(lengths)[:-1]))


def merged_alike(fields: Sequence[Field]) -> list[Field]:
    """With one category in the place of fields that have most of the values of training rows in common, as the drugs of
    a pair have."""
    groups: list[list[Field]] = []
    for field in fields:
        alike = next((some for some in groups if _much_alike(some[0].trained, field.trained)), None)
        if alike is None:
            groups.append([field])
        else:
            alike.append(field)
    return [some[0] if len(some) == 1 else _merged(some) for some in groups]


def _much_alike(values: set[str], others: set[str]) -> bool:
    return len(values & others) > min(len(values), len(others)) / 2


def _merged(fields: Sequence[Field]) -> Field:
    distinct = sorted({value for field in fields for value in field.values})
    number_of = {value: number for number, value in enumerate(distinct)}
    at_each = [np.array([number_of[value] for value in field.values], np.intp) for field in fields]

    def columns(parts: Sequence[NDArray[np.intp]]) -> NDArray[np.intp]:
        return np.concatenate([at_U[at_nC] for at_U, at_nC in zip(at_each, parts, strict=True)], axis=1)

    bits_UF = _bits(distinct, "category")
    parts = zip(*((field.train_nC, field.valid_nC, field.held_out_nC) for field in fields), strict=True)
    return Field("category", distinct, bits_UF, _features(distinct, "category", bits_UF), *map(columns, parts))


def _kind_of_words(distinct: Sequence[str], recur: bool) -> Kind:
    numbers = all(map(is_number, distinct))
    if recur:
        return "level" if numbers and len(distinct) > FEW else "category"
    return "number" if numbers else "sequence"


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _bits(values: Sequence[str], kind: Kind) -> Any:
    from scipy.sparse import csr_matrix, hstack, identity

    if kind == "category":
        return identity(len(values), np.float32, format="csr")
    if kind == "level":
        return hstack([_bits(values, "number"), _bits(values, "category")], format="csr")
    if kind == "number":
        number_U1 = np.array(values, float)[:, None]
        return csr_matrix((number_U1 >= np.quantile(number_U1, np.linspace(0, 1, STEPS))).astype(np.float32))
    if kind == "sequence":
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(
            analyzer=_runs, n_features=BITS, binary=True, norm=None, alternate_sign=False, dtype=np.float32
        ).transform(values)
    from rdkit import Chem, rdBase
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    generator = GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    with rdBase.BlockLogs():
        molecules = [Chem.MolFromSmiles(value) for value in values]
    nothing = np.zeros(BITS, np.float32)
    return csr_matrix(
        [nothing if m is None else generator.GetFingerprintAsNumPy(m).astype(np.float32) for m in molecules]
    )


def _runs(value: str) -> list[str]:
    """Of LETTERS letters; of a shorter value itself, or it would be like no other, nor itself."""
    return [value[at : at + LETTERS] for at in range(max(len(value) - LETTERS + 1, 1))]


def _features(values: Sequence[str], kind: Kind, bits_UF: Any) -> Any:
    """Bits do not tell what is a matter of composition, of length, or of size; of very many categories several share
    one, as in a hash."""
    from scipy.sparse import csr_matrix, hstack

    if kind == "number":
        number_U1 = np.array(values, float)[:, None]
        spread = number_U1.std() or 1.0
        return csr_matrix(((number_U1 - number_U1.mean()) / spread).astype(np.float32))
    if kind == "level":
        kinds: tuple[Kind, ...] = ("number", "category")
        return hstack([_features(values, one, _bits(values, one)) for one in kinds], format="csr")
    if kind == "category" and len(values) > BITS:
        ones, at = np.ones(len(values), np.float32), np.arange(len(values))
        return csr_matrix((ones, (at, at % BITS)), shape=(len(values), BITS))
    if kind != "sequence":
        return bits_UF
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(analyzer="char", ngram_range=(1, LETTERS - 1), lowercase=False, dtype=np.float32)
    return hstack([counter.fit_transform(values), bits_UF], format="csr")
