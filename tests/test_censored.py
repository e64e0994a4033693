"""Heads fitted to targets of which some say only that a value lies beyond a limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm, spearmanr

from tagllm.config import HeadConfig
from tagllm.evaluate.censored import Limits, beyond_limits, noise_of
from tagllm.evaluate.choosing import Rows
from tagllm.evaluate.closed_form import fit_head, predictions_of
from tagllm.evaluate.kernel_ridge import KernelFits, Similarity
from tagllm.evaluate.ridge import fit_ridge
from tagllm.head import Head, measured
from tagllm.model.value_head import HeadModule
from tagllm.tags import BackboneIdentity, Tag, TagLibrary
from tests.commands import Run, config, fails

D = 6
LIMIT = 50.0
FITS = {"linear": ("linear", 1), "every row": ("anova", 2000), "landmarks": ("anova", 400)}


def values(number: int, seed: int) -> Rows:
    """What would be there if all of it could be measured: half of it below LIMIT."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(number, D))
    y = LIMIT + 10 * x[:, :1] + 4 * np.sin(2 * x[:, 1:2]) + 2 * random.normal(size=(number, 1))
    return Rows((x + 300).astype(np.float32), y.astype(np.float32))


def read(rows: Rows) -> Rows:
    return Rows(rows.features_nF, np.maximum(rows.targets_nK, np.float32(LIMIT)))


def blank(fit: str = "linear", **spec: float) -> Head:
    kernel, landmarks = FITS[fit]
    head = Head.new(HeadConfig.model_validate({"kernel": kernel, "landmarks": landmarks, **spec}), D)
    return replace(head, mean_K=torch.tensor([54.0]), std_K=torch.tensor([6.0]))


def mse(answers: np.ndarray, rows: Rows) -> float:
    return float(np.mean((answers - rows.targets_nK) ** 2))


@pytest.mark.parametrize("fit", FITS)
def test_what_cannot_be_measured_is_told_apart_and_what_can_is_answered_better(fit: str) -> None:
    train, valid, test = (values(number, seed) for seed, number in enumerate((1000, 400, 2000)))
    plain = fit_head(blank(fit), read(train), read(valid))
    censored = fit_head(blank(fit, censored_below=LIMIT), read(train), read(valid))
    assert (censored.kernel is None) == (fit == "linear")
    features = torch.from_numpy(test.features_nF)
    better, worse = (mse((head.values(features) * 6 + 54).numpy(), test) for head in (censored, plain))
    assert better < 0.6 * worse, "below the limit, where nothing was seen"
    answers, before = (predictions_of(head, test.features_nF) for head in (censored, plain))
    assert answers.min() >= LIMIT and mse(answers, read(test)) < 0.9 * mse(before, read(test))
    under = test.targets_nK[:, 0] < LIMIT
    order, order_before = (spearmanr(found[under, 0], test.targets_nK[under, 0])[0] for found in (answers, before))
    assert order > (0.75 if fit == "linear" else order_before + 0.2), "a line is in order anyway"


@pytest.mark.parametrize("fit", FITS)
def test_above_is_below_upside_down(fit: str) -> None:
    def turned(rows: Rows) -> Rows:
        return Rows(rows.features_nF, -rows.targets_nK)

    train, valid = read(values(600, 0)), read(values(300, 1))
    below = fit_head(blank(fit, censored_below=LIMIT), train, valid)
    above = replace(blank(fit, censored_above=-LIMIT), mean_K=torch.tensor([-54.0]))
    above = fit_head(above, turned(train), turned(valid))
    np.testing.assert_allclose(
        predictions_of(above, valid.features_nF), -predictions_of(below, valid.features_nF), rtol=1e-3
    )


def test_the_fit_is_the_likeliest_one() -> None:
    """Of a Tobit model with the penalty as a prior, found by another way; both ends censored."""
    train, valid = values(400, 0), values(300, 1)
    target = np.clip((train.targets_nK - 54) / 6, -0.5, 1.0).astype(np.float32)
    fit = fit_ridge(
        Rows(train.features_nF, target), Rows(valid.features_nF, np.clip((valid.targets_nK - 54) / 6, -0.5, 1))
    )
    limits = Limits(target <= -0.5, target >= 1.0, np.float32([-0.5]), np.float32([1.0]))
    found = beyond_limits(fit, target, limits)
    noise = fit.error**0.5
    x = (train.features_nF - train.features_nF.mean(axis=0)) / train.features_nF.std(axis=0)
    y, low, high = target[:, 0], limits.below_nK[:, 0], limits.above_nK[:, 0]

    def nats(parameters: np.ndarray) -> float:
        value = x @ parameters[1:] + parameters[0]
        inside = norm.logpdf(y, value, noise)[~low & ~high].sum()
        beyond = norm.logcdf((-0.5 - value) / noise)[low].sum() + norm.logcdf((value - 1) / noise)[high].sum()
        return float(fit.penalty * (parameters[1:] ** 2).sum() / (2 * noise**2) - inside - beyond)

    best = minimize(nats, np.zeros(1 + D)).x
    np.testing.assert_allclose(found.own_values()[:, 0], x @ best[1:] + best[0], atol=0.03)
    assert np.abs(fit.own_values()[:, 0] - x @ best[1:] - best[0]).max() > 0.5, "or else the test tells little"


def test_a_kernel_on_every_row_ends_where_its_own_answers_are_what_it_expects() -> None:
    train = read(values(400, 0))
    target = (train.targets_nK - 54) / 6
    limit = np.float32([(LIMIT - 54) / 6])
    limits = Limits(train.targets_nK <= LIMIT, np.zeros(target.shape, bool), limit, np.float32([np.inf]))
    width = torch.from_numpy(train.features_nF.std(axis=0, keepdims=True)) * 4
    found = beyond_limits(
        KernelFits.of(Rows(train.features_nF, target), Similarity(width)).fit(4, target, 0.2), target, limits
    )
    value, under = found.own_values()[:, 0], limits.below_nK[:, 0]
    expected = [norm.expect(loc=v, scale=0.2**0.5, ub=limit[0], conditional=True) for v in value[under]]
    seen = found.targets_nK.numpy()[:, 0]
    assert np.sqrt(np.mean((seen[under] - expected) ** 2)) < 0.02
    np.testing.assert_array_equal(seen[~under], target[~under, 0])
    weights, bias = found.weight_nK.numpy(), found.bias_K.numpy()
    np.testing.assert_allclose(value, (found.fits.system.similar_nn.numpy() @ weights)[:, 0] + bias, atol=0.02)


@pytest.mark.parametrize("fit", FITS)
def test_where_nothing_is_censored_nothing_changes(fit: str) -> None:
    train, valid = values(600, 0), values(300, 1)
    plain = fit_head(blank(fit), train, valid)
    censored = fit_head(blank(fit, censored_below=-1000), train, valid)
    np.testing.assert_allclose(
        predictions_of(censored, valid.features_nF), predictions_of(plain, valid.features_nF), rtol=2e-3
    )


@given(
    value=st.floats(-30, 30),
    noise=st.floats(0.05, 5),
    low=st.none() | st.floats(-20, 0),
    high=st.none() | st.floats(1, 20),
)
def test_the_answer_is_what_would_be_measured(
    value: float, noise: float, low: float | None, high: float | None
) -> None:
    spec = HeadConfig(censored_below=low, censored_above=high)
    mean_K, std_K = torch.tensor([2.0]), torch.tensor([3.0])
    found = float(measured(torch.tensor([[value]]), torch.tensor([noise]), spec, mean_K, std_K)) * 3 + 2
    at, sd = value * 3 + 2, noise * 3
    edges = sorted({at, *(end for end in (low, high) if end is not None and abs(end - at) < 12 * sd)})

    def weighted(y: float) -> float:
        read = y if low is None else max(y, low)
        return float((read if high is None else min(read, high)) * norm.pdf(y, at, sd))

    expected = quad(weighted, at - 12 * sd, at + 12 * sd, points=edges, limit=200)[0]
    assert found == pytest.approx(expected, abs=1e-3 * sd + 1e-4)
    assert (low is None or found >= low - 1e-5) and (high is None or found <= high + 1e-5)


def test_noise_is_that_of_rows_held_out_and_guessed_where_hardly_any_has_a_value() -> None:
    random = np.random.default_rng(0)
    value = random.normal(size=(4000, 2)).astype(np.float32)
    target = np.clip(value + np.array([0.3, 1.5]) * random.normal(size=value.shape), -0.2, 1.4).astype(np.float32)
    low, high = np.float32([-0.2] * 2), np.float32([1.4] * 2)
    limits = Limits(target <= low, target >= high, low, high)
    np.testing.assert_allclose(noise_of(value, target, limits, otherwise=7.0), [0.3, 1.5], rtol=0.06)
    nearly = np.flatnonzero(limits.below_nK.all(axis=1))[:200]
    few = Limits(limits.below_nK[nearly], limits.above_nK[nearly], low, high)
    np.testing.assert_array_equal(noise_of(value[nearly], target[nearly], few, otherwise=7.0), 7.0)


@pytest.mark.parametrize("fit", FITS)
def test_the_library_keeps_it_and_steps_go_on_from_it(tmp_path: Path, fit: str) -> None:
    train, valid = read(values(600, 0)), read(values(300, 1))
    head = fit_head(blank(fit, censored_below=LIMIT), train, valid)
    identity = BackboneIdentity("tiny", "llama", D, 96, "f" * 64)
    TagLibrary(identity, {"K": Tag("K", "function", torch.zeros(2, D), head)}).save(tmp_path / "library")
    back = TagLibrary.load(tmp_path / "library").tags["K"].head
    assert back is not None and back.noise_K is not None and head.noise_K is not None
    assert back.noise_K.equal(head.noise_K)
    module, features = HeadModule(back), torch.from_numpy(valid.features_nF)
    answers = module.unstandardise(module(features, features))
    np.testing.assert_allclose(answers.detach(), predictions_of(head, valid.features_nF), rtol=1e-4)
    assert torch.equal(module.as_head().answer(features), back.answer(features))
    (answers - torch.from_numpy(valid.targets_nK)).square().sum().backward()
    assert module.weight_KF.grad is not None and module.weight_KF.grad.isfinite().all()
    assert back.blank().noise_K is None


def test_a_run_answers_within_the_limits(run: Run, folder: Path) -> None:
    head = {"reads": "both", "censored_below": 8.0, "censored_above": 12.0}
    file = config(folder, "censored", tags={"W": {"kind": "function", "length": 2, "head": head}})
    assert run("train", file).exit_code == 0
    learned = TagLibrary.load(folder / "runs/censored/library").tags["W"].head
    assert learned is not None and learned.noise_K is not None, "the fit was kept"
    told = run("eval", folder / "runs/censored")
    assert told.exit_code == 0, told.output
    answers = load_file(folder / "runs/censored/held_out.safetensors")["values_nK"]
    assert (answers >= 8).all() and (answers <= 12).all() and answers.std() > 0
    baselines = json.loads((folder / "runs/censored/results.json").read_text())["baselines"]
    assert "ridge_both" in baselines


def test_mistakes(run: Run, folder: Path) -> None:
    for name, head, words in (
        ("crossed", {"censored_below": 9.0, "censored_above": 3.0}, ("censored_below is 9.0 and censored_above 3.0",)),
        ("no number", {"censored_below": float("nan")}, ("censored_below is nan", "a finite number")),
        ("steps", {"censored_above": 3.0, "refit": False}, ("censored_above is 3.0", "refit: true")),
        (
            "classes",
            {"type": "classification", "classes": ["a", "b"], "censored_below": 0.0},
            ("censored_below is 0.0",),
        ),
    ):
        tags = {"W": {"kind": "function", "length": 2, "head": head}}
        fails(run("train", config(folder, name, tags=tags)), "tags.W.head", *words)
