"""Baselines that see the fields as they are and no LLM, on the same rows: means per value, the nearest training row,
a line and boosted trees on fingerprints.

n rows, C columns, U distinct values of a field, F features, K targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagllm.arrays import Doubles, Floats
from tagllm.evaluate.choosing import ENOUGH_ROWS, Rows
from tagllm.evaluate.estimators import FIFTH, Problem, boosting, frequencies, logistic, ridge
from tagllm.evaluate.fields import Field, field_of, merged_alike

Fields = Mapping[str, Sequence[str]]
Key = tuple[str, ...]
SURE = 0.99
"""Of what is answered as probabilities; the rest is how often each class is."""
MOST_MEANS = 6
"""Fields that have a row of their own."""
SOME = 64
"""Held-out rows at a time that are compared with all that training rows hold."""


class Table(NamedTuple):
    """Labelled rows of one source."""

    fields: Fields
    targets_nK: Floats


class Scale(NamedTuple):
    """Of training targets. Fits and choices are of standardised ones: of several, each counts as much as another, and
    none stops early for being in small units."""

    mean_K: Doubles
    std_K: Doubles

    @classmethod
    def of(cls, targets_nK: Floats) -> Scale:
        std_K = targets_nK.std(axis=0, dtype=np.float64)
        return cls(targets_nK.mean(axis=0, dtype=np.float64), np.where(std_K > 0, std_K, 1.0))

    def standardised(self, targets_nK: Floats) -> Floats:
        values_nK: Floats = ((targets_nK - self.mean_K) / self.std_K).astype(np.float32)
        return values_nK

    def as_given(self, values_nK: Floats) -> Floats:
        found_nK: Floats = (values_nK * self.std_K + self.mean_K).astype(np.float32)
        return found_nK


def classical_baselines(
    train: Table, valid: Table, held_out: Fields, trading: Sequence[Sequence[str]] = (), num_classes: int = 0
) -> dict[str, Floats]:
    """What each baseline answers to the held-out rows (n, K), logits where targets are classes; what it has to choose
    it chooses on the validation rows. `field_means` (an additive effect per value of each field, on log odds of
    classes; one in all columns that have their values in common, where that answers the validation rows better) is
    left out where values hardly recur, `mean_of_FIELD` (what training rows with the same value had) where no row to
    answer has one of them, `pair_means` (what rows with the same values had) where no row to answer has values that
    stand together in a training row.

    Args:
        trading: names of columns that may trade places, as two drugs of a pair: a value tells the same in each of them.
    """
    together = [*trading, *([name] for name in train.fields if not any(name in names for names in trading))]
    fields = [
        field_of(*([table[name] for name in names] for table in (train.fields, valid.fields, held_out)))
        for names in together
    ]
    scale = Scale.of(train.targets_nK)
    targets = train.targets_nK, valid.targets_nK
    if not num_classes:
        targets = scale.standardised(train.targets_nK), scale.standardised(valid.targets_nK)
    line, means = _line(num_classes), [_shares(x, num_classes) for x in targets]
    predictions = {"nearest_row": means[0][_nearest(fields)]}
    if recurring := [field for field in fields if field.recurs]:
        predictions["field_means"] = _field_means(recurring, *targets, num_classes)
        of_pairs = _pair_means(recurring, means[0], means[1], predictions["field_means"])
        predictions |= {} if of_pairs is None else {"pair_means": of_pairs}
        titles = ["+".join(names) for names, field in zip(together, fields, strict=True) if field.recurs]
        predictions |= _means_of_each(dict(zip(titles, recurring, strict=True)), means[0])
    problem = _problem(fields, *targets)
    predictions["logistic_fingerprints" if num_classes else "ridge_fingerprints"] = line(problem)
    predictions["boosting_fingerprints"] = boosting(problem, num_classes)
    if num_classes:
        prior_K = frequencies(train.targets_nK, num_classes)
        predictions = {name: np.log(SURE * p_nK + (1 - SURE) * prior_K) for name, p_nK in predictions.items()}
        return {name: values.astype(np.float32) for name, values in predictions.items()}
    return {name: scale.as_given(values) for name, values in predictions.items()}


def _line(num_classes: int) -> Callable[[Problem], Floats]:
    return partial(logistic, num_classes=num_classes) if num_classes else ridge


def _shares(targets_nK: Floats, num_classes: int) -> Floats:
    """Targets whose mean is to be answered: of classes, 1 for the right one and 0 for the others."""
    return np.eye(num_classes, dtype=np.float32)[targets_nK[:, 0].astype(int)] if num_classes else targets_nK


def _problem(fields: Sequence[Field], train_nK: Floats, valid_nK: Floats, categories: bool = False) -> Problem:
    """Sparse features of all rows; `categories` takes each value as it is."""
    from scipy.sparse import hstack, identity

    blocks = [identity(len(f.values), np.float32, format="csr") if categories else f.features_UF for f in fields]

    def columns(rows: Sequence[NDArray[np.intp]]) -> Any:
        return hstack(
            [sum(block[at_n] for at_n in at_nC.T) for block, at_nC in zip(blocks, rows, strict=True)], format="csr"
        )

    return Problem(
        Rows(columns([f.train_nC for f in fields]), train_nK),
        Rows(columns([f.valid_nC for f in fields]), valid_nK),
        columns([f.held_out_nC for f in fields]),
    )


def _field_means(fields: Sequence[Field], train_nK: Floats, valid_nK: Floats, num_classes: int) -> Floats:
    """An additive effect of each value: one in each column, or one in all columns that have most of their values in
    common (a drug, whichever of a pair it is), whichever answers the rows to choose by better."""
    line, apart, alike = _line(num_classes), list(fields), merged_alike(fields)
    problems = [_problem(some, train_nK, valid_nK, categories=True) for some in (apart, alike)]

    def error(problem: Problem) -> float:
        fit, choose = problem.halves(FIFTH)
        answer_nK = line(Problem(fit, choose, choose.features_nF))
        return float(np.mean((answer_nK - _shares(choose.targets_nK, num_classes)) ** 2))

    return line(min(problems, key=error) if len(alike) < len(apart) else problems[0])


def _means_of_each(fields: Mapping[str, Field], train_nK: Floats) -> dict[str, Floats]:
    """`mean_of_FIELD`: of the training rows with the same value, or of all where none has it (of columns that may trade
    places, averaged over these). Not of fields that tell rows apart as an earlier one does, a name beside its molecule,
    and of MOST_MEANS at most."""
    found: dict[str, Floats] = {}
    for name, field in fields.items():
        at_n, num_columns = field.train_nC.ravel(), field.train_nC.shape[1]
        count_U1 = np.bincount(at_n, minlength=len(field.values))[:, None]
        sum_UK = np.zeros((len(field.values), train_nK.shape[1]))
        np.add.at(sum_UK, at_n, np.repeat(train_nK, num_columns, axis=0))
        mean_UK = np.where(count_U1 > 0, sum_UK / np.maximum(count_U1, 1), train_nK.mean(axis=0, dtype=np.float64))
        answer_nK = mean_UK[field.held_out_nC].mean(axis=1).astype(np.float32)
        told = any(np.array_equal(answer_nK, other_nK) for other_nK in found.values())
        if count_U1[field.held_out_nC].any() and not told and len(found) < MOST_MEANS:
            found[f"mean_of_{name}"] = answer_nK
    return found


def _pair_means(fields: Sequence[Field], train_nK: Floats, valid_nK: Floats, otherwise_nK: Floats) -> Floats | None:
    """The mean of the training rows with the same values, in any columns (A with B as B with A) or in the same ones
    where that answers the validation rows better; of a row that has none, what else is known. None where none has any.

    The paper never ran it: where a benchmark has pairs on both sides of its split, this is what it takes to know them.
    """
    if sum(field.train_nC.shape[1] for field in fields) < 2:
        return None
    mean_nK = np.repeat(train_nK.mean(axis=0)[None], len(valid_nK), axis=0)

    def error(anywhere: bool) -> float:
        asked = _keys(fields, "valid", anywhere)
        return float(np.mean((_means_of(_keys(fields, "train", anywhere), train_nK, asked, mean_nK) - valid_nK) ** 2))

    anywhere = len(valid_nK) < ENOUGH_ROWS or error(True) <= error(False)
    train, held_out = _keys(fields, "train", anywhere), _keys(fields, "held_out", anywhere)
    return _means_of(train, train_nK, held_out, otherwise_nK) if {*train} & {*held_out} else None


def _means_of(train: Sequence[Key], train_nK: Floats, asked: Sequence[Key], otherwise_nK: Floats) -> Floats:
    found: dict[Key, list[Floats]] = {}
    for key, target_K in zip(train, train_nK, strict=True):
        found.setdefault(key, []).append(target_K)
    pairs = zip(asked, otherwise_nK, strict=True)
    answers = [np.mean(found[key], axis=0) if key in found else else_K for key, else_K in pairs]
    return np.array(answers, np.float32).reshape(otherwise_nK.shape)


def _keys(fields: Sequence[Field], rows: str, anywhere: bool) -> list[Key]:
    """The values of each row, as they stand in its columns or, `anywhere`, in their own order."""
    at_nC = [(field, at_n) for field in fields for at_n in getattr(field, f"{rows}_nC").T]
    columns = [[field.values[at] for at in at_n] for field, at_n in at_nC]
    return [tuple(sorted(row) if anywhere else row) for row in zip(*columns, strict=True)]


def _nearest(fields: Sequence[Field]) -> NDArray[np.intp]:
    """For each held-out row the training row that is most alike: Tanimoto similarity, summed over the columns, which
    trade places where they may and it helps."""
    best = []
    for start in range(0, len(fields[0].held_out_nC), SOME):
        rows = range(start, min(start + SOME, len(fields[0].held_out_nC)))
        tables = [_tanimoto(f.bits_UF, np.unique(f.held_out_nC[rows.start : rows.stop])) for f in fields]
        for at in rows:
            alike_n = sum(_alike(table, f.held_out_nC[at], f.train_nC) for table, f in zip(tables, fields, strict=True))
            best.append(int(np.argmax(alike_n)))
    return np.array(best, np.intp)


def _alike(table: Mapping[int, Floats], value_C: NDArray[np.intp], train_nC: NDArray[np.intp]) -> Floats:
    orders = itertools.permutations(value_C.tolist())
    each = [sum(table[value][at_n] for value, at_n in zip(order, train_nC.T, strict=True)) for order in orders]
    found_n: Floats = np.max(each, axis=0)
    return found_n


def _tanimoto(bits_UF: Any, wanted: NDArray[np.intp]) -> dict[int, Floats]:
    """Similarity of each wanted value to all values."""
    size_U = np.asarray(bits_UF.sum(axis=1)).ravel()
    both = (bits_UF[wanted] @ bits_UF.T).toarray()
    union = size_U[wanted][:, None] + size_U[None] - both
    return dict(zip(wanted.tolist(), both / np.maximum(union, 1), strict=True))
