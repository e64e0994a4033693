"""The closed-form head: recovers a linear law, distrusts noise, and is what scikit-learn gives."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from tagllm.evaluate.choosing import ENOUGH_ROWS, Rows, clearly_better
from tagllm.evaluate.ridge import PENALTIES, RidgeFit, fit_ridge

WEIGHT_KF = np.array([[1.0, -2.0, 0.0, 0.5], [0.0, 0.3, 4.0, -1.0]])


def law(rows: int, noise: float, seed: int = 0) -> Rows:
    """Features of very different scale and centre, and two targets."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(rows, 4)) * [1, 10, 0.1, 3] + [0, 100, -5, 1]
    targets = features @ WEIGHT_KF.T + [3, -7] + noise * random.normal(size=(rows, 2))
    return Rows(features.astype(np.float32), targets.astype(np.float32))


def fit_alone(rows: Rows) -> RidgeFit:
    """Without validation rows."""
    return fit_ridge(rows, rows.some(np.arange(0)))


def answers(fit: RidgeFit, features_nF: np.ndarray) -> np.ndarray:
    return features_nF @ fit.weight_KF.T + fit.bias_K


def test_recovers_a_linear_law() -> None:
    fit = fit_alone(law(2000, 0.0))
    assert fit.weight_KF.shape == (2, 4)
    assert fit.bias_K.shape == (2,)
    np.testing.assert_allclose(fit.weight_KF, WEIGHT_KF, rtol=1e-3, atol=3e-3)
    features, targets = law(50, 0.0, seed=1)
    np.testing.assert_allclose(answers(fit, features), targets, rtol=1e-3, atol=1e-2)


def test_the_penalty_grows_with_noise() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 30)).astype(np.float32)
    clean = features[:, :1] * 2
    penalties = [
        fit_alone(Rows(features, (clean + noise * random.normal(size=(60, 1))).astype(np.float32))).penalty
        for noise in (0.0, 2.0, 50.0)
    ]
    assert penalties == sorted(penalties)
    assert penalties[0] < penalties[1] < penalties[2]
    assert set(penalties) <= set(PENALTIES.tolist())


@pytest.mark.parametrize("outputs", [1, 2])
def test_equals_scikit_learn_at_the_chosen_penalty(outputs: int) -> None:
    features, targets = law(200, 5.0)
    targets = targets[:, :outputs]
    fit = fit_alone(Rows(features, targets))
    scaler = StandardScaler().fit(features)
    plain = Ridge(fit.penalty).fit(scaler.transform(features), targets)
    expected = plain.predict(scaler.transform(features)).reshape(-1, outputs)
    np.testing.assert_allclose(answers(fit, features), expected, rtol=1e-3, atol=1e-2)


def test_a_constant_feature_gets_no_say() -> None:
    """A hidden unit that never moved in training must not blow up predictions when it moves later."""
    features, targets = law(300, 0.1)
    features[:, 2] = 1234.1
    fit = fit_alone(Rows(features, targets))
    moved = features.copy()
    moved[:, 2] += 1
    assert np.abs(answers(fit, moved) - answers(fit, features)).max() < 1e-2


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_few_rows_and_many_features(rows: int) -> None:
    random = np.random.default_rng(0)
    fit = fit_alone(Rows(random.normal(size=(rows, 50)).astype(np.float32), np.ones((rows, 1), np.float32)))
    np.testing.assert_allclose(answers(fit, random.normal(size=(4, 50)).astype(np.float32)), 1, atol=1e-5)


def pairs(groups: int, seed: int) -> Rows:
    """Thirty rows a group, almost alike; most of a row's target is of its group alone and says nothing about others."""
    random = np.random.default_rng(seed)
    of_group = random.normal(size=(groups, 60))
    features = np.repeat(of_group, 30, axis=0) + random.normal(0, 0.05, size=(groups * 30, 60))
    chance = np.repeat(random.normal(size=(groups, 1)), 30, axis=0)
    return Rows(features.astype(np.float32), (0.3 * features[:, :1] + chance).astype(np.float32))


def test_related_rows_ask_for_a_stronger_penalty_than_their_folds_do() -> None:
    train, valid, test = pairs(40, 0), pairs(40, 1), pairs(40, 2)
    by_folds, by_validation = fit_alone(train), fit_ridge(train, valid)
    assert by_validation.penalty > by_folds.penalty
    error = [
        float(((answers(fit, test.features_nF) - test.targets_nK) ** 2).mean()) for fit in (by_folds, by_validation)
    ]
    assert error[1] < 0.8 * error[0]


def test_too_few_validation_rows_choose_nothing() -> None:
    train, valid = pairs(40, 0), pairs(40, 1)
    few = fit_ridge(train, valid.some(np.arange(ENOUGH_ROWS - 1)))
    assert few.penalty == fit_alone(train).penalty != fit_ridge(train, valid).penalty


def test_same_rows_same_fit() -> None:
    first, second = fit_alone(law(100, 1.0)), fit_alone(law(100, 1.0))
    np.testing.assert_array_equal(first.weight_KF, second.weight_KF)


def test_luck_in_few_rows_is_not_better() -> None:
    random = np.random.default_rng(0)
    error_n = random.exponential(1.0, 32).astype(np.float32)
    other_n = random.exponential(1.0, 32).astype(np.float32)
    assert not clearly_better(error_n, error_n)
    assert not (clearly_better(error_n, other_n) and clearly_better(other_n, error_n))
    noise_n = random.normal(0, 0.1, 32)
    slightly_n = (error_n + noise_n - noise_n.mean() + 0.005).astype(np.float32)
    assert not clearly_better(error_n, slightly_n)
    assert clearly_better(error_n, error_n + 0.01) and not clearly_better(error_n + 0.01, error_n)
