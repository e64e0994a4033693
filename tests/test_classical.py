"""Baselines without an LLM: each finds what it is there to find, and no more."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse import random as sparse_random
from sklearn.ensemble import HistGradientBoostingRegressor

from tagllm.evaluate.choosing import Rows
from tagllm.evaluate.classical import Table, _field_means, _means_of_each, _nearest, _pair_means, classical_baselines
from tagllm.evaluate.estimators import Problem, boosting, logistic
from tagllm.evaluate.fields import Field, field_of, kind_of, merged_alike
from tagllm.evaluate.metrics import concordance, value_metrics

MOLECULES = ["CCO", "CCN", "CCCCCC", "c1ccccc1", "c1ccccc1O", "CC(=O)O", "CC(C)C", "C1CCCCC1", "CCCl", "O=C=O"]
RANDOM = np.random.default_rng(0)
PROTEINS = ["".join(RANDOM.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60)) for _ in range(8)]


NOTHING = Table({"smiles": [], "sequence": []}, np.zeros((0, 1), np.float32))


def test_kinds() -> None:
    assert kind_of(MOLECULES) == "molecule"
    assert kind_of(PROTEINS) == "sequence"
    assert kind_of(["A2058", "HT29", "breast"]) == "category"
    peptides = ["".join(RANDOM.choice(list("ACDEFGHIKLMNPQRSTVWY"), 3 + at % 8)) for at in range(60)]
    assert kind_of(peptides) == "sequence"
    assert kind_of(peptides[:10]) == "category", "a few words may be names"


def pairs() -> tuple[dict[str, list[str]], np.ndarray]:
    """Every molecule with every protein; the target is a sum of an effect of each."""
    of_molecule, of_protein = RANDOM.normal(size=len(MOLECULES)), RANDOM.normal(size=len(PROTEINS))
    every = list(itertools.product(range(len(MOLECULES)), range(len(PROTEINS))))
    RANDOM.shuffle(every)
    targets = np.array([[of_molecule[m] + of_protein[p]] for m, p in every], np.float32)
    return {"smiles": [MOLECULES[m] for m, _ in every], "sequence": [PROTEINS[p] for _, p in every]}, targets


def test_additive_effects_are_what_the_means_find() -> None:
    fields, targets = pairs()
    train, test = slice(0, 60), slice(60, None)
    known = Table({k: v[train] for k, v in fields.items()}, targets[train])
    found = classical_baselines(known, NOTHING, {k: v[test] for k, v in fields.items()})
    r2 = {name: value_metrics(values, targets[test], classes=False)["r2"] for name, values in found.items()}
    assert set(found) == {
        "nearest_row", "field_means", "mean_of_smiles", "mean_of_sequence", "ridge_fingerprints",
        "boosting_fingerprints",
    }  # fmt: skip
    assert r2["field_means"] > 0.95
    assert r2["ridge_fingerprints"] > 0.9


def test_classes_have_the_same_baselines_as_logits() -> None:
    """Which of three classes a row is, is told by its molecule."""
    fields, _ = pairs()
    targets = np.array([[MOLECULES.index(one) % 3] for one in fields["smiles"]], np.float32)
    train, test = slice(0, 60), slice(60, None)
    known = Table({k: v[train] for k, v in fields.items()}, targets[train])
    found = classical_baselines(known, NOTHING, {k: v[test] for k, v in fields.items()}, num_classes=4)
    assert set(found) == {
        "nearest_row", "field_means", "mean_of_smiles", "mean_of_sequence", "logistic_fingerprints",
        "boosting_fingerprints",
    }  # fmt: skip
    scores = {name: value_metrics(logits, targets[test], classes=True) for name, logits in found.items()}
    assert min(scores[name]["accuracy"] for name in ("field_means", "logistic_fingerprints")) > 0.9
    for logits in found.values():
        assert np.exp(logits).sum(axis=1) == pytest.approx(1, abs=1e-4)
        assert logits[:, 3].max() < -5, "no training row has the fourth"
    again = classical_baselines(known, known, known.fields, num_classes=4)
    assert again["nearest_row"].argmax(axis=1).tolist() == targets[train, 0].tolist()


def test_boosted_trees_find_classes_that_no_line_tells_apart() -> None:
    random = np.random.default_rng(5)
    x, y = random.uniform(-1, 1, (2, 900))
    targets = ((x > 0) == (y > 0)).astype(np.float32)[:, None]
    targets[:2] = 2.0  # in the training rows alone, and then in none of what is fitted

    def table(rows: slice) -> Table:
        return Table({"x": [f"{v:.4f}" for v in x[rows]], "y": [f"{v:.4f}" for v in y[rows]]}, targets[rows])

    for valid in (table(slice(400, 700)), table(slice(400, 400))):
        found = classical_baselines(table(slice(400)), valid, table(slice(700, 900)).fields, num_classes=3)
        scores = {name: value_metrics(logits, targets[700:], classes=True) for name, logits in found.items()}
        assert scores["boosting_fingerprints"]["accuracy"] > 0.9 > 0.7 > scores["logistic_fingerprints"]["accuracy"]
        assert "field_means" not in found and all(np.isfinite(logits).all() for logits in found.values())


def test_one_class_is_all_that_is_answered_where_training_rows_have_no_other() -> None:
    table = Table({"smiles": MOLECULES}, np.ones((len(MOLECULES), 1), np.float32))
    for logits in classical_baselines(table, table, {"smiles": MOLECULES[:3]}, num_classes=2).values():
        assert logits.argmax(axis=1).tolist() == [1, 1, 1] and np.isfinite(logits).all()


def test_a_class_that_a_fit_finds_impossible_costs_a_finite_number_of_nats() -> None:
    """Else no strength could be compared with another, and numpy would warn of infinities."""
    sign_n = np.repeat([-1.0, 1.0], 300)
    rows = Rows(1e4 * sign_n[:, None], (sign_n[:, None] > 0).astype(np.float32))
    turned = Rows(1e4 * rows.features_nF, 1 - rows.targets_nK)
    with np.errstate(divide="raise"):
        shares_nK = logistic(Problem(rows, turned, rows.features_nF[:5]), 2)
    assert np.isfinite(shares_nK).all()


def test_one_training_row_is_fitted_and_chosen_by() -> None:
    alone = Rows(csr_matrix(np.ones((1, 2), np.float32)), np.ones((1, 1), np.float32))
    fit, choose = Problem(alone, alone.some(np.arange(0)), alone.features_nF).halves(0.2)
    assert len(fit.targets_nK) == len(choose.targets_nK) == 1


def test_columns_that_trade_places_tell_the_same() -> None:
    """Each molecule stands in one column in training and in the other one in the rows to answer."""
    of_molecule = RANDOM.normal(size=len(MOLECULES))
    seen = [(a, b) for a, b in itertools.product(range(5), range(5, 10))] * 3
    targets = np.array([[of_molecule[a] + of_molecule[b]] for a, b in seen], np.float32)

    def fields(pairs: list[tuple[int, int]]) -> dict[str, list[str]]:
        return {"a": [MOLECULES[a] for a, _ in pairs], "b": [MOLECULES[b] for _, b in pairs]}

    nothing = Table({"a": [], "b": []}, targets[:0])
    other_way = fields([(b, a) for a, b in seen])
    found = classical_baselines(Table(fields(seen), targets), nothing, other_way, [["a", "b"]])
    r2 = {name: value_metrics(values, targets, classes=False)["r2"] for name, values in found.items()}
    assert r2["field_means"] > 0.95 and r2["ridge_fingerprints"] > 0.9 and r2["nearest_row"] > 0.99
    apart = classical_baselines(Table(fields(seen), targets), nothing, other_way)
    assert value_metrics(apart["field_means"], targets, classes=False)["r2"] < 0.1


@pytest.mark.parametrize("same", [True, False], ids=["either drug", "first and second"])
def test_an_effect_is_shared_by_columns_with_the_same_values_where_that_answers_better(same: bool) -> None:
    """As of two drugs that no head was told to be a pair; of a giver and a taker it is not so."""
    random = np.random.default_rng(6)
    first, second = random.normal(size=(2, 30))
    pair = random.integers(0, 30, (600, 2))
    target = first[pair[:, 0]] + (first if same else second)[pair[:, 1]] + 0.5 * random.normal(size=600)
    targets = target[:, None].astype(np.float32)
    parts = slice(100), slice(100, 350), slice(350, 600)
    fields = [field_of(*([[f"drug {at}" for at in pair[part, column]]] for part in parts)) for column in (0, 1)]
    train, valid, test = (targets[part] for part in parts)
    r2 = value_metrics(_field_means(fields, train, valid, 0), test, classes=False)["r2"]
    merged = _field_means(merged_alike(fields), train, valid, 0)
    of_merged = value_metrics(merged, test, classes=False)["r2"]
    assert r2 == of_merged > 0.7 if same else r2 > of_merged + 0.1


def test_what_a_value_had_answers_it_and_what_all_had_the_others() -> None:
    """Of each field once, and of columns that may trade places together."""

    def means(columns: dict[str, list[list[str]]], held_out: dict[str, list[list[str]]]) -> dict[str, list[float]]:
        fields = {name: field_of(of, [[] for _ in of], held_out[name]) for name, of in columns.items()}
        found = _means_of_each(fields, np.array([[1.0], [3.0], [5.0], [7.0]], np.float32))
        return {name: values_n1[:, 0].tolist() for name, values_n1 in found.items()}

    drug, cell = ["a", "a", "b", "b"], ["x", "y", "x", "y"]
    asked = {"drug": [["a", "b", "?"]], "name": [["A", "B", "!"]], "cell": [["x", "?", "y"]], "who": [["?", "?", "?"]]}
    found = means({"drug": [drug], "name": [[one.upper() for one in drug]], "cell": [cell], "who": [cell]}, asked)
    assert found == {"mean_of_drug": [2, 6, 4], "mean_of_cell": [3, 4, 5]}
    either = means({"a+b": [drug, ["b", "b", "c", "c"]]}, {"a+b": [["a"], ["c"]]})
    assert either == {"mean_of_a+b": [(2 + 6) / 2]}
    seven = {f"field {mask}": [[f"{mask >> row & 1}" for row in range(4)]] for mask in range(1, 8)}
    assert len(means(seven, {name: [of[0][:2]] for name, of in seven.items()})) == 6, "of seven that differ"


def test_what_a_pair_had_answers_it_in_either_order() -> None:
    """As where a benchmark is split by ordered pairs, with names beside the molecules; unless the rows to choose by say
    that the order counts."""
    seen = [(a, b) for a, b in itertools.product(range(5), range(5, 10)) for _ in range(10)]
    of_pair = dict(zip(dict.fromkeys(seen), np.random.default_rng(4).normal(size=25), strict=True))
    targets = np.array([[of_pair[pair]] for pair in seen], np.float32)
    turned = [(b, a) for a, b in seen]

    def fields(*tables: list[tuple[int, int]]) -> list[Field]:
        names = ([f"drug {pair[at]}" for pair in table] for at in (0, 1) for table in tables)
        smiles = ([MOLECULES[pair[at]] for pair in table] for at in (0, 1) for table in tables)
        columns = [[column] for column in (*names, *smiles)]
        return [field_of(*columns[at : at + 3]) for at in range(0, len(columns), 3)]

    zeros = np.zeros_like(targets)
    assert _pair_means(fields(seen, turned, turned), targets, targets, zeros) == pytest.approx(targets)
    assert _pair_means(fields(seen, [], turned), targets, targets[:0], zeros) == pytest.approx(targets)
    both, opposite = [*seen, *turned], np.concatenate([targets, -targets])
    ordered = _pair_means(fields(both, both, [(0, 5), (5, 0)]), opposite, opposite, zeros[:2])
    assert ordered == pytest.approx(np.array([[of_pair[0, 5]], [-of_pair[0, 5]]]), rel=1e-5)
    assert _pair_means(fields(seen, turned, [(0, 1), (2, 3)]), targets, targets, zeros[:2]) is None, "not known"


def test_numbers_are_numbers_and_what_never_recurs_is_text() -> None:
    random = np.random.default_rng(2)
    dose = random.uniform(0, 10, 300)
    notes = [" ".join(random.choice(["good", "bad", "warm", "cold"], 6)) + f" {at}" for at in range(300)]
    targets = np.array([[2 * x + 5 * note.count("good")] for x, note in zip(dose, notes, strict=True)], np.float32)
    fields = {"dose": [f"{x:.4f}" for x in dose], "note": notes}
    nothing = Table({"dose": [], "note": []}, targets[:0])
    known = Table({k: v[:240] for k, v in fields.items()}, targets[:240])
    found = classical_baselines(known, nothing, {k: v[240:] for k, v in fields.items()})
    r2 = {name: value_metrics(values, targets[240:], classes=False)["r2"] for name, values in found.items()}
    assert r2["ridge_fingerprints"] > 0.9 and r2["boosting_fingerprints"] > 0.7
    assert len(np.unique(found["nearest_row"])) > 10


def test_numbers_that_recur_are_near_others_and_values_of_their_own() -> None:
    """Temperatures, doses and ages; the jump at one of them is nothing that a line through all would tell."""
    random = np.random.default_rng(4)
    dose = random.integers(0, 60, 400) / 20
    targets = (np.sin(dose) + dose + 3 * (dose == 1.5))[:, None].astype(np.float32)

    def r2(of: list[str]) -> dict[str, float]:
        parts = slice(200), slice(200, 400)
        train, valid = (Table({"dose": of[part]}, targets[part]) for part in parts)
        found = classical_baselines(train, valid, {"dose": of[parts[1]]})
        return {name: value_metrics(values, targets[200:], classes=False)["r2"] for name, values in found.items()}

    numbers, names = r2([f"{x:.2f}" for x in dose]), r2([f"dose {x:.2f}" for x in dose])
    assert numbers["boosting_fingerprints"] > 0.8 > 0.1 > names["boosting_fingerprints"]
    assert numbers["nearest_row"] > 0.9 and numbers["ridge_fingerprints"] > names["ridge_fingerprints"]
    assert numbers["field_means"] == pytest.approx(names["field_means"])
    assert field_of([[f"{at % 9}" for at in range(90)]], [[]], [[]]).kind == "category", "a few are names"


def test_what_is_a_matter_of_letters_and_length_is_found_in_sequences() -> None:
    random = np.random.default_rng(1)
    weight = dict(zip("ACDEFGHIKLMNPQRSTVWY", random.uniform(60, 190, 20), strict=True))
    sequences = ["".join(random.choice(list(weight), random.integers(20, 60))) for _ in range(500)]
    targets = np.array([[sum(weight[letter] for letter in one)] for one in sequences], np.float32)
    known = Table({"sequence": sequences[:400]}, targets[:400])
    nothing = Table({"sequence": []}, targets[:0])
    found = classical_baselines(known, nothing, {"sequence": sequences[400:]})
    r2 = {name: value_metrics(values, targets[400:], classes=False)["r2"] for name, values in found.items()}
    assert r2["ridge_fingerprints"] > 0.99
    assert r2["boosting_fingerprints"] > 0.6


def test_what_is_chosen_is_chosen_on_validation_where_it_can_be() -> None:
    """Targets of training rows are noise alone, of validation rows zero: the strongest penalty, no tree."""
    random = np.random.default_rng(0)
    names = [f"line {at}" for at in range(20)]

    def table(rows: int, scale: float) -> Table:
        return Table({"line": list(random.choice(names, rows))}, random.normal(0, scale, (rows, 1)).astype(np.float32))

    train, valid = table(400, 1.0), table(400, 0.0)
    spread = {
        name: float(np.abs(values).mean())
        for name, values in classical_baselines(train, valid, {"line": names}).items()
    }
    alone = classical_baselines(train, table(10, 0.0), {"line": names})
    assert spread["ridge_fingerprints"] < float(np.abs(alone["ridge_fingerprints"]).mean())
    assert spread["boosting_fingerprints"] < 0.2 < spread["nearest_row"]


@pytest.mark.parametrize("values", [2, 40, 1000])
def test_boosting_on_features_that_tell_rows_apart_is_boosting_on_all(values: int) -> None:
    random = np.random.default_rng(values)
    some = random.integers(0, values, (700, 12)) * random.random((700, 12)).round()
    features = np.concatenate([np.ones((700, 1)), some, some[:, :5], np.zeros((700, 2))], axis=1).astype(np.float32)
    targets = (some[:, :4].sum(axis=1) + random.normal(size=700)).astype(np.float32)
    chosen_by = {"X_val": features[300:600], "y_val": targets[300:600]}
    plain = max(
        (
            HistGradientBoostingRegressor(learning_rate=rate, max_iter=1000, early_stopping=True, random_state=0).fit(
                features[:300], targets[:300], **chosen_by
            )
            for rate in (0.03, 0.1, 0.3)
        ),
        key=lambda fit: -float(np.mean((fit.predict(features[300:600]) - targets[300:600]) ** 2)),
    )
    seen, chosen = (Rows(csr_matrix(features[part]), targets[part, None]) for part in (slice(300), slice(300, 600)))
    found = boosting(Problem(seen, chosen, csr_matrix(features[600:])))
    assert found[:, 0].tolist() == plain.predict(features[600:]).tolist()


def test_a_target_is_answered_as_well_beside_noise_in_thousands_and_in_any_unit() -> None:
    """What is chosen is chosen for each target alone, and what is no gain any more is seen in units of its spread."""
    random = np.random.default_rng(3)
    line, ways = random.integers(0, 5, 500), random.normal(size=5)
    target_n1 = (ways[line] + 0.1 * random.normal(size=500))[:, None]

    def r2(targets_nK: np.ndarray, unit: float = 1.0) -> dict[str, float]:
        def table(rows: slice) -> Table:
            return Table({"line": [f"line {at}" for at in line[rows]]}, (unit * targets_nK[rows]).astype(np.float32))

        train, valid, test = table(slice(200)), table(slice(200, 400)), table(slice(400, 500))
        found = classical_baselines(train, valid, test.fields)
        pairs = {name: (values[:, :1] / unit, test.targets_nK[:, :1] / unit) for name, values in found.items()}
        return {name: value_metrics(*pair, classes=False)["r2"] for name, pair in pairs.items()}

    alone = r2(target_n1)
    assert alone["field_means"] > 0.95 and alone["boosting_fingerprints"] > 0.95
    assert r2(np.hstack([target_n1, 1e4 * random.normal(size=(500, 1))])) == pytest.approx(alone, abs=1e-3)
    assert r2(target_n1, unit=1e-7) == pytest.approx(alone, abs=1e-3)


def test_a_row_that_was_seen_is_its_own_nearest() -> None:
    fields, targets = pairs()
    found = classical_baselines(Table(fields, targets), NOTHING, {k: v[:20] for k, v in fields.items()})
    assert found["nearest_row"] == pytest.approx(targets[:20])


def test_words_of_one_and_two_letters_are_their_own_nearest() -> None:
    words = [a + b for a in "abcdefghij" for b in ("", *"klmnopqrst")]
    targets = np.arange(len(words), dtype=np.float32)[:, None]
    nothing = Table({"word": []}, targets[:0])
    found = classical_baselines(Table({"word": words}, targets), nothing, {"word": words[::-1]})
    assert found["nearest_row"] == pytest.approx(targets[::-1], abs=1e-3)


def test_values_that_never_recur_have_no_means() -> None:
    smiles = {"smiles": ["C" * n + "O" for n in range(1, 41)]}
    targets = np.arange(40, dtype=np.float32)[:, None]
    nothing = Table({"smiles": []}, targets[:0])
    found = classical_baselines(Table(smiles, targets), nothing, {"smiles": ["C" * 41 + "O", "CO"]})
    assert "field_means" not in found and "nearest_row" in found


def test_concordance_counts_pairs() -> None:
    targets = RANDOM.integers(0, 5, 60).astype(np.float32)
    values = (targets + RANDOM.normal(size=60)).round(1).astype(np.float32)
    told = [
        0.5 if values[i] == values[j] else float((values[i] < values[j]) == (targets[i] < targets[j]))
        for i, j in itertools.combinations(range(60), 2)
        if targets[i] != targets[j]
    ]
    assert concordance(values[:, None], targets[:, None])[0] == pytest.approx(np.mean(told), abs=1e-9)
    assert concordance(np.zeros((5, 1)), np.arange(5.0)[:, None]) == [0.5]


def test_the_nearest_row_is_found_without_a_table_of_all_pairs() -> None:
    wanted, known = 1000, 20_000
    bits = sparse_random(wanted + known, 64, 0.05, format="csr", dtype=np.float32, random_state=0)
    train, nothing = np.arange(known)[:, None] + wanted, np.zeros((0, 1), np.intp)
    field = Field("category", [], bits, bits, train, nothing, np.arange(wanted)[:, None])
    tracemalloc.start()
    try:
        assert _nearest([field]).shape == (wanted,)
        assert tracemalloc.get_traced_memory()[1] < 60e6, "all pairs would be 80 MB in fp32"
    finally:
        tracemalloc.stop()


def test_very_many_names_take_no_more_room_than_a_fingerprint() -> None:
    names = [f"patient {at // 3}" for at in range(6000)]
    known = Table({"who": names}, RANDOM.normal(size=(6000, 1)).astype(np.float32))
    tracemalloc.start()
    try:
        found = classical_baselines(known, NOTHING._replace(fields={"who": []}), {"who": names[:5]})
        assert tracemalloc.get_traced_memory()[1] < 150e6, "one column each would be 48 MB, several times over"
    finally:
        tracemalloc.stop()
    assert {len(values) for values in found.values()} == {5}
