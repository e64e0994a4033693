"""Baselines of heads of classes: how often each class is, and what the frozen LLM tells of it."""

from __future__ import annotations

import numpy as np
import pytest

from tagllm.evaluate.class_probes import class_baselines
from tagllm.evaluate.features import Features
from tagllm.evaluate.metrics import value_metrics


def features(number: int, seed: int, classes: int = 3) -> Features:
    """The class is told by the state before the tag, in part."""
    random = np.random.default_rng(seed)
    target_n = random.choice(classes, number, p=np.array([6, 3, 1][:classes]) / sum([6, 3, 1][:classes]))
    last_nD = random.normal(size=(number, 8)).astype(np.float32)
    last_nD[:, :classes] += 2 * np.eye(classes, dtype=np.float32)[target_n]
    mean_nD = random.normal(size=(number, 8)).astype(np.float32)
    return Features(last_nD, mean_nD, target_n[:, None].astype(np.float32))


@pytest.mark.parametrize("valid_rows", [300, 20])
def test_probes_find_what_the_state_tells_and_frequencies_are_those_of_training(valid_rows: int) -> None:
    train, valid, test = (features(n, seed) for seed, n in enumerate((600, valid_rows, 300)))
    found = class_baselines(train, valid, test, 3)
    scores = {name: value_metrics(logits, test.targets_nK, classes=True) for name, logits in found.items()}
    assert set(found) == {"predict_frequencies", "logistic_last", "logistic_mean", "logistic_both"}
    shares = np.exp(found["predict_frequencies"][0])
    assert shares == pytest.approx(np.bincount(train.targets_nK[:, 0].astype(int)) / 600, abs=1e-4)
    assert scores["logistic_last"]["auroc"] > 0.9 > scores["logistic_mean"]["auroc"]
    frequencies = scores["predict_frequencies"]["cross_entropy"]
    assert scores["logistic_last"]["cross_entropy"] < 0.8 * frequencies
    assert scores["logistic_mean"]["cross_entropy"] == pytest.approx(frequencies, rel=0.1), "noise is penalised away"


def test_classes_that_training_lacks_have_logits_too() -> None:
    train, test = features(100, 0, classes=2), features(50, 1, classes=3)
    for logits in class_baselines(train, train.none(), test, 3).values():
        assert logits.shape == (50, 3) and np.isfinite(logits).all() and logits[:, 2].max() < -5
    alone = Features(*(column[train.targets_nK[:, 0] == 0] for column in train))
    for logits in class_baselines(alone, alone.none(), test, 3).values():
        assert logits.argmax(axis=1).tolist() == [0] * 50
