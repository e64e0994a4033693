"""Metrics against scipy and numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from tagllm.arrays import Floats
from tagllm.evaluate.metrics import intervals, value_metrics

NAN = float("nan")


def column(*values: float) -> Floats:
    return np.array(values, np.float32)[:, None]


def test_regression_by_hand_and_scipy() -> None:
    random = np.random.default_rng(0)
    targets = random.normal(size=(40, 1)).astype(np.float32)
    values = (np.exp(targets) + 0.3 * random.normal(size=(40, 1))).astype(np.float32)
    found = value_metrics(values, targets, classes=False)
    error = values.astype(float) - targets
    assert found["mse"] == pytest.approx((error**2).mean())
    assert found["mae"] == pytest.approx(abs(error).mean())
    assert found["r2"] == pytest.approx(1 - (error**2).sum() / ((targets - targets.mean()) ** 2).sum(), rel=1e-5)
    assert found["pearson"] == pytest.approx(stats.pearsonr(values[:, 0], targets[:, 0])[0], rel=1e-5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(values[:, 0], targets[:, 0])[0], rel=1e-5)


def test_spearman_with_ties() -> None:
    values, targets = column(1, 1, 2, 3, 3, 3), column(2, 1, 2, 5, 4, 5)
    expected = stats.spearmanr(values[:, 0], targets[:, 0])[0]
    assert value_metrics(values, targets, classes=False)["spearman"] == pytest.approx(expected)


def test_a_perfect_prediction() -> None:
    targets = column(1, 2, 4)
    assert value_metrics(targets, targets, classes=False) == pytest.approx(
        {"mse": 0, "mae": 0, "r2": 1, "pearson": 1, "spearman": 1, "concordance": 1}, abs=1e-5
    )


@pytest.mark.filterwarnings("error")
def test_a_constant_prediction_has_no_correlation() -> None:
    found = value_metrics(column(2, 2, 2), column(1, 2, 3), classes=False)
    nothing = {"r2": 0, "pearson": 0, "spearman": 0, "concordance": 0.5}
    assert found == pytest.approx({"mse": 2 / 3, "mae": 2 / 3, **nothing})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-23, 1e-9, 1e-4, 1.0, 1e6])
def test_r2_and_correlations_have_no_unit(scale: float) -> None:
    """Of concentrations in mol/l too, whose squared residuals are next to nothing."""
    random = np.random.default_rng(1)
    targets = random.normal(size=(400, 1)).astype(np.float32)
    noise = random.normal(size=(400, 1)).astype(np.float32)
    expected = 1 - np.square(noise - targets).sum() / np.square(targets - targets.mean()).sum()
    found = value_metrics(noise * np.float32(scale), targets * np.float32(scale), classes=False)
    assert found["r2"] == pytest.approx(expected, rel=1e-3)
    assert found["pearson"] == pytest.approx(stats.pearsonr(noise[:, 0], targets[:, 0])[0], rel=1e-3)
    assert found["spearman"] == pytest.approx(stats.spearmanr(noise[:, 0], targets[:, 0])[0], rel=1e-3)
    mean = np.full_like(targets, targets.mean() * scale)
    assert value_metrics(mean, targets * np.float32(scale), classes=False)["r2"] == pytest.approx(0, abs=1e-3)


def test_r2_is_of_targets_that_differ() -> None:
    """All draws of a few rows with the same target would be divided by nothing."""
    values_n1, targets_n1 = np.array([[1.0], [2.0], [3.0]], np.float32), np.array([[1.5], [2.0], [2.5]], np.float32)
    found = intervals(values_n1, targets_n1, classes=False)
    assert all(np.isfinite(ends).all() for ends in found.values()) and "r2" in found
    alike_n1 = np.full_like(targets_n1, 2)
    for told in (value_metrics(values_n1, alike_n1, classes=False), intervals(values_n1, alike_n1, classes=False)):
        assert "mse" in told and "r2" not in told


def test_missing_targets_do_not_count() -> None:
    full = value_metrics(column(1, 2, 4), column(1, 3, 3), classes=False)
    assert value_metrics(column(1, 2, 9, 4), column(1, 3, NAN, 3), classes=False) == full
    assert value_metrics(column(1, 2), column(NAN, NAN), classes=False) == {}
    assert value_metrics(column(), column(), classes=False) == {}


def test_one_row_has_its_errors_and_nothing_that_takes_two() -> None:
    """Of several outputs each metric is of those that have rows enough for it."""
    assert value_metrics(column(1, 7), column(3, NAN), classes=False) == {"mse": 4, "mae": 2}
    assert intervals(column(1, 7), column(3, NAN), classes=False) == {}
    assert value_metrics(np.array([[2, 0]], np.float32), column(0), classes=True)["accuracy"] == 1
    values, targets = np.array([[1, 1], [2, 5]], np.float32), np.array([[3, 2], [NAN, 7]], np.float32)
    found = value_metrics(values, targets, classes=False)
    assert found["mse"] == (4 + (1 + 4) / 2) / 2 and found["pearson"] == pytest.approx(1)
    assert intervals(values, targets, classes=False)["mse"] == (3.25, 3.25), "each is the only one of its kind"


def test_several_outputs_are_averaged_each_over_its_own_rows() -> None:
    values = np.array([[1, 1], [2, 5], [3, 0]], np.float32)
    targets = np.array([[1, 2], [2, 7], [6, NAN]], np.float32)
    found = value_metrics(values, targets, classes=False)
    assert found["mse"] == pytest.approx((9 / 3 + (1 + 4) / 2) / 2)
    assert found["mae"] == pytest.approx((3 / 3 + (1 + 2) / 2) / 2)


def test_outputs_with_names_have_metrics_of_their_own() -> None:
    """Beside a target in thousands nothing else shows in a mean."""
    random = np.random.default_rng(0)
    targets = (random.normal(size=(40, 2)) * [1, 1000]).astype(np.float32)
    values = (targets + random.normal(size=(40, 2)) * [1, 1000]).astype(np.float32)
    targets[:39, 1] = NAN
    for measure in (value_metrics, intervals):
        mean, named = measure(values, targets, False), measure(values, targets, False, ["a", "b"])
        alone = measure(values[:, :1], targets[:, :1], False)
        assert {name: named[name] for name in mean} == mean
        of_first = {name.removeprefix("a/"): value for name, value in named.items() if name.startswith("a/")}
        assert of_first.keys() == alone.keys() and of_first["mse"] == pytest.approx(alone["mse"], rel=0.1)
        assert {name for name in named if name.startswith("b/")} == {"b/mse", "b/mae"}, "of one row"
        assert measure(values[:, :1], targets[:, :1], False, ["a"]) == alone, "nothing to be told apart"


def test_classes_by_hand() -> None:
    """Accuracy 3 of 4; F1 of class 0 is 2/3 (one hit, one false alarm), of class 1 is 4/5; the one row of class 0 has
    the highest score for it."""
    logits = np.array([[2, 0], [0, 1], [0, 3], [1, 0]], np.float32)
    found = value_metrics(logits, column(0, 1, 1, 1), classes=True)
    log_odds = np.array([-2, -1, -3, 1.0])  # of the wrong class against the right one
    assert found == pytest.approx(
        {
            "accuracy": 3 / 4, "f1": (2 / 3 + 4 / 5) / 2, "auroc": 1,
            "cross_entropy": np.log1p(np.exp(log_odds)).mean(),
        },
        rel=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_sure_head_ranks_as_an_unsure_one(num_classes: int) -> None:
    """Probabilities of margins above 17 are all 1 in fp32, and would tie."""
    random = np.random.default_rng(0)
    targets = column(*random.integers(num_classes, size=200))
    right = np.eye(num_classes)[targets[:, 0].astype(int)]
    logits = (random.normal(size=(200, num_classes)) + right).astype(np.float32)
    odds = [logits[:, k] - np.logaddexp.reduce(np.delete(logits, k, 1), axis=1) for k in range(num_classes)]
    expected = np.mean([roc_auc_score(targets[:, 0] == k, odds[k]) for k in range(num_classes)])
    assert value_metrics(logits, targets, classes=True)["auroc"] == pytest.approx(expected, abs=1e-6)
    if num_classes == 2:  # where the order of odds is that of margins, whatever they are multiplied with
        assert value_metrics(64 * logits, targets, classes=True)["auroc"] == pytest.approx(expected, abs=1e-6)


def test_classes_without_a_target() -> None:
    logits = np.array([[2, 0], [0, 1], [5, 0]], np.float32)
    assert value_metrics(logits, column(0, 1, NAN), classes=True)["accuracy"] == 1
    assert value_metrics(logits, column(NAN, NAN, NAN), classes=True) == {}


def test_a_rare_class_has_an_interval() -> None:
    """Some draws miss it."""
    random = np.random.default_rng(0)
    targets = np.zeros((300, 1), np.float32)
    targets[:2] = 1
    logits = np.stack([np.zeros(300), random.normal(size=300) + 2 * targets[:, 0]], axis=1).astype(np.float32)
    low, high = intervals(logits, targets, classes=True)["auroc"]
    assert 0 <= low <= value_metrics(logits, targets, classes=True)["auroc"] <= high <= 1


def test_intervals_are_those_of_the_mean_where_it_is_one() -> None:
    """Of MSE, a mean over rows, normal theory tells the width; missing targets do not count."""
    random = np.random.default_rng(3)
    targets = random.normal(size=(400, 1)).astype(np.float32)
    values = targets + random.normal(size=(400, 1)).astype(np.float32)
    targets[::10] = NAN
    low, high = intervals(values, targets, classes=False)["mse"]
    errors = ((values - targets) ** 2)[np.isfinite(targets)]
    half = 1.96 * errors.std() / len(errors) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)
    assert low < errors.mean() < high
    assert intervals(column(1), column(NAN), classes=False) == {}


def test_intervals_of_every_metric_are_those_of_draws_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two outputs, one with gaps and ties; many draws are measured at once, here or in several parts."""
    random = np.random.default_rng(5)
    targets = random.normal(size=(60, 2)).round(1).astype(np.float32)
    values = (targets + random.normal(size=(60, 2))).astype(np.float32)
    targets[::3, 1] = NAN
    told = intervals(values, targets, classes=False)
    gaps, full = np.flatnonzero(np.isnan(targets[:, 1])), np.flatnonzero(np.isfinite(targets[:, 1]))
    draws = [np.concatenate([random.choice(rows, len(rows)) for rows in (gaps, full)]) for _ in range(300)]
    each = [value_metrics(values[rows], targets[rows], classes=False) for rows in draws]
    for name, (low, high) in told.items():
        expected = np.quantile([metrics[name] for metrics in each], [0.025, 0.975])
        assert [low, high] == pytest.approx(expected, abs=0.3 * (expected[1] - expected[0])), name
    monkeypatch.setattr("tagllm.evaluate.metrics.NUMBERS_AT_ONCE", 60 * 70)
    in_parts = intervals(values, targets, classes=False)
    assert in_parts.keys() == told.keys()
    assert in_parts["mse"] == pytest.approx(told["mse"], rel=0.1)


def test_an_answer_that_is_no_number_is_not_drawn_away() -> None:
    """Draws that miss it would show a good metric where it has none."""
    targets = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    values = targets + np.float32(0.5)
    values[7] = np.inf
    assert value_metrics(values, targets, classes=False)["mse"] == np.inf
    assert intervals(values, targets, classes=False)["mse"][1] == np.inf
    values[7] = NAN
    assert np.isnan(value_metrics(values, targets, classes=False)["pearson"])
