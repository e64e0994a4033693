"""Heads in closed form: a kernel where a line does not do, a line where it does; the library keeps both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.gaussian_process.kernels import Matern
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import KFold

from tagllm.config import HeadConfig
from tagllm.data.batch import Counts
from tagllm.evaluate import kernel_widths
from tagllm.evaluate.choosing import Rows, clearly_better
from tagllm.evaluate.closed_form import fit_head, predictions_of
from tagllm.evaluate.kernel_ridge import PENALTIES, RANK, KernelFits, Nystroem, Similarity
from tagllm.evaluate.kernel_widths import SOME_PENALTIES, SPREADS, choose_widths
from tagllm.evaluate.passes import Pass
from tagllm.evaluate.ridge import fit_ridge
from tagllm.head import Head, States, fields_alone
from tagllm.kernel import BOUNDLESS

D = 6
OFFSET = 300.0
"""Hidden states have an offset far larger than what tells them apart."""


def rows(number: int, seed: int, curved: bool) -> Rows:
    random = np.random.default_rng(seed)
    x = random.normal(size=(number, D))
    y = np.sin(2 * x[:, :1]) * x[:, 1:2] if curved else x[:, :1] - 3 * x[:, 1:2]
    features = x * [1, 10, 0.1, 3, 1, 1] + OFFSET
    return Rows(features.astype(np.float32), (50 + 7 * y + 0.1 * random.normal(size=y.shape)).astype(np.float32))


def blank(kernel: str = "anova", landmarks: int = 400) -> Head:
    head = Head.new(HeadConfig.model_validate({"kernel": kernel, "landmarks": landmarks}), D)
    return replace(head, mean_K=torch.tensor([50.0]), std_K=torch.tensor([5.0]))


def error(head: Head, on: Rows) -> float:
    return float(np.mean((predictions_of(head, on.features_nF) - on.targets_nK) ** 2) / on.targets_nK.var())


def test_a_curve_is_learned_with_a_kernel_and_not_without() -> None:
    train, valid, test = (rows(n, seed, curved=True) for seed, n in enumerate((1000, 300, 300)))
    line, curve = fit_head(blank("linear"), train, valid), fit_head(blank(), train, valid)
    assert line.kernel is None and error(line, test) > 0.9
    assert curve.kernel is not None and error(curve, test) < 0.5


def test_a_line_stays_a_line() -> None:
    train, valid = rows(60, 0, curved=False), rows(300, 1, curved=False)
    fit = fit_head(blank(), train, valid)
    assert fit.kernel is None, "the kernel cannot be better at a linear law of so few rows"
    assert error(fit, valid) < 1e-3


def test_many_rows_are_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The width is chosen on some of them: a fit on 20,000 takes minutes."""
    tried, held_out_by = list[int](), kernel_widths.held_out_by
    fitted, fit = list[int](), KernelFits.of
    monkeypatch.setattr(
        kernel_widths, "held_out_by", lambda some, valid: tried.append(len(some.targets_nK)) or held_out_by(some, valid)
    )
    monkeypatch.setattr(kernel_widths, "ROWS_FOR_WIDTH", 200)
    monkeypatch.setattr(
        KernelFits, "of", lambda rows, similar: fitted.append(len(rows.targets_nK)) or fit(rows, similar)
    )
    train, valid = (rows(n, seed, curved=True) for seed, n in enumerate((600, 300)))
    head = fit_head(blank(landmarks=600), train, valid)
    assert tried == [200] and fitted == [600]
    assert head.kernel is not None and head.kernel.at_SM.shape == (1, 600)
    assert error(head, valid) < error(fit_head(blank(landmarks=600), train.some(np.arange(200)), valid), valid)


@pytest.mark.parametrize("held_out", [300, 0], ids=["validation rows", "folds"])
def test_the_width_is_the_best_that_kernel_ridge_regression_finds(held_out: int) -> None:
    train, valid = rows(250, 0, curved=True), rows(held_out, 1, curved=True)
    folds = KFold(5, shuffle=True, random_state=0).split(train.features_nF)
    pairs = [(train, valid)] if held_out else [(train.some(seen), train.some(unseen)) for seen, unseen in folds]
    one_F = train.features_nF.std(axis=0) * np.sqrt(2 * D)

    def error_of(penalty: float, width_F: np.ndarray, seen: Rows, unseen: Rows) -> float:
        mean_K = seen.targets_nK.mean(axis=0)
        plain = KernelRidge(alpha=penalty, kernel=Matern(1.0, nu=1.5))
        plain.fit(seen.features_nF / width_F, seen.targets_nK - mean_K)
        return float(np.mean((plain.predict(unseen.features_nF / width_F) + mean_K - unseen.targets_nK) ** 2))

    def error_left_out(penalty: float, width_F: np.ndarray, seen: Rows) -> float:
        number = len(seen.targets_nK)
        others = ~np.eye(number, dtype=bool)
        return float(
            np.mean([error_of(penalty, width_F, seen.some(others[at]), seen.some([at])) for at in range(number)])
        )

    def error_at(spread: float) -> float:
        width_F = one_F / np.sqrt(spread)
        errors = np.array([[error_of(penalty, width_F, *pair) for penalty in SOME_PENALTIES] for pair in pairs])
        best = [SOME_PENALTIES[at] for at in errors.argmin(axis=1)]
        left_out = [error_left_out(penalty, width_F, seen) for penalty, (seen, _) in zip(best, pairs, strict=True)]
        return errors.mean(axis=0).min() * np.mean(left_out)

    best = min(SPREADS, key=error_at)
    assert best not in (SPREADS[0], SPREADS[-1]), "or else the test tells little"
    found = choose_widths(train, valid, States((0,), ((0,),)), landmarks=400)
    np.testing.assert_allclose(found.width_SD[0], one_F / np.sqrt(best), rtol=1e-5)


def test_a_state_that_tells_nothing_is_left_out_at_every_spread() -> None:
    """The other one is known best from afar, which is no reason to look at this one."""
    train, valid = (rows(400, seed, curved=False) for seed in (0, 1))
    beside = [Rows(np.hstack([np.full_like(x, 3.0), x]), y) for x, y in (train, valid)]
    found = choose_widths(*beside, States.of(HeadConfig(reads="both"), (0,)), landmarks=400)
    assert (found.width_SD[0] >= BOUNDLESS).all()
    assert found.width_SD[1].numpy() != pytest.approx(train.features_nF.std(axis=0) * np.sqrt(2 * D), rel=0.2)


def test_each_state_has_its_own_width() -> None:
    """One of which only near rows tell something, one that tells something from afar, and one that is noise."""
    random = np.random.default_rng(0)

    def three_states(number: int) -> Rows:
        kind, x = random.integers(60, size=number), random.normal(size=(number, D))
        near = directions[kind] + 0.01 * random.normal(size=(number, D))
        y = worth[kind] + np.sin(x[:, 0])
        states = np.stack([near, x, random.normal(size=(number, D))], axis=1)
        return Rows((states + OFFSET).reshape(number, -1).astype(np.float32), y[:, None].astype(np.float32))

    directions, worth = random.normal(size=(60, D)), random.normal(size=60)
    train, valid, test = (three_states(number) for number in (600, 300, 1000))
    head = Head.new(HeadConfig(reads="both", kernel="anova", landmarks=1000), D, pools=(0, 1))
    one_SD = torch.from_numpy(train.features_nF.std(axis=0)).reshape(3, D) * (2 * D) ** 0.5
    of_one_width = []
    for spread in SPREADS:
        fits = KernelFits.of(train, Similarity(one_SD / spread**0.5))
        of_one_width.append(min(fits.errors(test)) / test.targets_nK.var())
    assert error(fit_head(head, train, valid), test) < 0.8 * min(of_one_width)


@pytest.mark.parametrize("told", [False, True], ids=["noise", "tells"])
def test_a_state_of_the_tag_that_does_harm_is_left_out(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are curved in their fields and, where the tag tells anything, in its state. Few rows may make much of a
    state that many make nothing of: here its width is as that of the fields."""
    spec = HeadConfig.model_validate({"kernel": "anova", "reads": "both", "landmarks": 1000})
    head = replace(Head.new(spec, D), mean_K=torch.tensor([50.0]), std_K=torch.tensor([5.0]))
    random = np.random.default_rng(0)

    def both(number: int, seed: int) -> Rows:
        fields = rows(number, seed, curved=True)
        state = random.normal(size=(number, D)).astype(np.float32)
        targets = fields.targets_nK + 10 * np.sin(2 * state[:, :1]) * told
        return Rows(np.concatenate([state, fields.features_nF], axis=1), targets)

    train, valid, test = (both(n, seed) for seed, n in enumerate((600, 300, 300)))

    def two_deviations(train: Rows, *_: object) -> Similarity:
        width_F = torch.from_numpy(train.features_nF.std(axis=0) * 2)
        return Similarity(torch.where(width_F > 0, width_F, BOUNDLESS).reshape(-1, D))

    monkeypatch.setattr("tagllm.evaluate.closed_form.choose_widths", two_deviations)
    fit = fit_head(head, train, valid)
    assert fit.kernel is not None and error(fit, test) < 0.8
    traded = test.features_nF.copy()
    traded[:, :D] = traded[::-1, :D]
    moved = np.abs(predictions_of(fit, traded) - predictions_of(fit, test.features_nF)).mean()
    assert moved > 1 if told else moved < 1e-3
    assert fit.reads_tag == told and ("QED" in fields_alone({"QED": fit, "SMILES": None})) == (not told)


def test_fields_that_answer_alone_have_widths_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are best beside a state of the tag need not be without it."""
    monkeypatch.setattr("tagllm.evaluate.closed_form.clearly_better", lambda *_: True)
    fields_alone = [rows(number, seed, curved=True) for seed, number in enumerate((600, 300, 300))]
    random = np.random.default_rng(0)

    def told(of: Rows) -> Rows:
        """A state of the tag has the target and some noise, so that the fields hardly count beside it; no line tells
        it, since half of the states are turned round."""
        state = of.targets_nK - 50 + random.normal(size=of.features_nF.shape)
        state[:, 1:2] = 10
        state = OFFSET + state * random.choice([-1, 1], size=(len(state), 1))
        return Rows(np.concatenate([state, of.features_nF], axis=1, dtype=np.float32), of.targets_nK)

    train, valid, test = map(told, fields_alone)
    spec = HeadConfig(reads="both", kernel="anova", landmarks=1000)
    of_both = fit_head(replace(Head.new(spec, D), std_K=torch.tensor([5.0])), train, valid)
    of_fields = fit_head(blank(landmarks=1000), *fields_alone[:2])
    beside = choose_widths(train, valid, States.of(spec, (0,)), 1000)
    assert of_both.kernel is not None and of_fields.kernel is not None
    np.testing.assert_allclose(of_both.kernel.width_SD[1], of_fields.kernel.width_SD[0], rtol=1e-5)
    assert not np.allclose(beside.width_SD[1], of_fields.kernel.width_SD[0], rtol=0.1), "or else the test tells little"
    assert error(of_both, test) == pytest.approx(error(of_fields, fields_alone[2]), rel=0.02)


def test_a_kernel_whose_error_is_no_number_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelFits, "errors", lambda self, held_out: np.full(len(PENALTIES), np.nan))
    train, valid = (rows(n, seed, curved=True) for seed, n in enumerate((300, 300)))
    assert fit_head(blank(), train, valid).kernel is None


@pytest.mark.parametrize("spread", SPREADS)
def test_all_rows_as_landmarks_are_kernel_ridge_regression(spread: float) -> None:
    train, valid = rows(250, 0, curved=True), rows(300, 1, curved=True)
    width = torch.from_numpy(train.features_nF.std(axis=0, keepdims=True) * np.sqrt(2 * D / spread)).float()
    landmarks = Nystroem.of(train.features_nF, len(train.targets_nK), Similarity(width))
    fit = fit_ridge(landmarks.rows(train), landmarks.rows(valid), one_scale=True)
    found = landmarks.kernel(fit.weight_KF)(torch.from_numpy(valid.features_nF)).numpy() + fit.bias_K
    width_F = width[0].numpy()
    kernel = Matern(1.0, nu=1.5)(train.features_nF / width_F)
    mean_n = kernel.mean(axis=0)
    centered = kernel - mean_n - mean_n[:, None] + kernel.mean()
    penalty = fit.penalty * np.trace(centered) / len(kernel) ** 2  # features as `one_scale` makes them: variance 1
    plain = KernelRidge(alpha=penalty, kernel="precomputed").fit(centered, train.targets_nK - train.targets_nK.mean())
    across = Matern(1.0, nu=1.5)(valid.features_nF / width_F, train.features_nF / width_F)
    across = across - across.mean(axis=1, keepdims=True) - mean_n + kernel.mean()
    expected = plain.predict(across) + train.targets_nK.mean()
    assert np.std(found - expected) < 0.05 * np.std(expected), "all that differs is the jitter"


@pytest.mark.parametrize("rank", [40, RANK])
@pytest.mark.parametrize("outputs", [1, 2])
def test_every_penalty_is_kernel_ridge_regression(monkeypatch: pytest.MonkeyPatch, rank: int, outputs: int) -> None:
    """Whether the preconditioner knows all of the kernel or hardly any of it."""
    monkeypatch.setattr("tagllm.evaluate.kernel_ridge.RANK", rank)
    train, valid = rows(400, 0, curved=True), rows(100, 1, curved=True)
    more = np.zeros_like(train.targets_nK)  # a target that is solved before the first step
    train = Rows(train.features_nF, np.concatenate([train.targets_nK, more], axis=1)[:, :outputs])
    width = torch.from_numpy(train.features_nF.std(axis=0, keepdims=True) * 2)
    fits = KernelFits.of(train, Similarity(width))
    width_F, mean_K = width[0].numpy(), train.targets_nK.mean(axis=0)
    kernel = Matern(1.0, nu=1.5)(train.features_nF / width_F)
    across = Matern(1.0, nu=1.5)(valid.features_nF / width_F, train.features_nF / width_F)
    for at, penalty in enumerate(PENALTIES):
        plain = KernelRidge(alpha=penalty, kernel="precomputed").fit(kernel, train.targets_nK - mean_K)
        expected = plain.predict(across).reshape(-1, outputs)
        found = fits.fit(at, train.targets_nK, 0.0).kernel()(torch.from_numpy(valid.features_nF)).numpy()
        assert np.isfinite(found).all() and np.std(found - expected) < 0.01 * np.std(expected), penalty


def test_landmarks_alike_do_no_harm() -> None:
    train, valid = (rows(n, seed, curved=True) for seed, n in enumerate((300, 300)))
    twice = Rows(np.repeat(train.features_nF, 2, axis=0), np.repeat(train.targets_nK, 2, axis=0))
    for landmarks in (500, 600):  # some, and all of them
        assert error(fit_head(blank(landmarks=landmarks), twice, valid), valid) < 0.6


@pytest.mark.parametrize("kernel", ["linear", "anova"])
def test_a_length_that_never_differed_says_nothing(kernel: str) -> None:
    """Of rows of one length: another one is answered as these are, and not as far away from all of them."""

    def with_length(of: Rows, length: float) -> Rows:
        state = np.zeros_like(of.features_nF)
        state[:, 0] = length
        return Rows(np.concatenate([of.features_nF, state], axis=1), of.targets_nK)

    train, valid = (rows(n, seed, curved=kernel == "anova") for seed, n in enumerate((500, 300)))
    spec = HeadConfig(reads="mean", lengths=True, kernel=kernel, landmarks=400)
    head = replace(Head.new(spec, D), mean_K=torch.tensor([50.0]), std_K=torch.tensor([5.0]))
    fit = fit_head(head, with_length(train, 2.3), with_length(valid, 2.3))
    assert (fit.kernel is not None) == (kernel == "anova")
    same, other = (predictions_of(fit, with_length(valid, length).features_nF) for length in (2.3, 3.1))
    np.testing.assert_allclose(other, same, rtol=1e-3)


def pass_of(valid: Rows, values_nK: np.ndarray, value_sum: float) -> Pass:
    nothing, n = np.zeros((len(values_nK), 0), np.float32), len(values_nK)
    return Pass((0, 0, value_sum), Counts(0, 0, n), values_nK, valid.targets_nK, valid.features_nF, nothing, nothing)


def test_answers_that_are_no_numbers_do_not_look_perfect() -> None:
    """The head that steps gave may have run away; the loss of the fit that takes its place is its own."""
    valid = rows(300, 1, curved=False)
    head = fit_head(blank("linear"), rows(300, 0, curved=False), valid)
    wild = np.where(np.arange(300)[:, None] % 2 == 0, np.nan, np.inf).astype(np.float32)
    trained = pass_of(valid, wild, np.inf)
    fitted = trained.answered_by(head, np.ones(300, bool))
    expected = ((predictions_of(head, valid.features_nF) - valid.targets_nK) / 5) ** 2
    assert np.isinf(trained.errors(head)).all()
    assert fitted.sums[2] == pytest.approx(float(expected.sum()), rel=1e-5)
    assert not clearly_better(trained.errors(head), fitted.errors(head))
    assert clearly_better(fitted.errors(head), trained.errors(head))
    assert not clearly_better(trained.errors(head), trained.errors(head))


def test_one_row_makes_nothing_clear() -> None:
    assert not clearly_better(np.array([0.1], np.float32), np.array([0.4], np.float32))


def test_a_fit_changes_the_loss_by_its_own_rows() -> None:
    """Rows of another head keep their answers, and their part of the loss."""
    valid = rows(300, 1, curved=False)
    head = fit_head(blank("linear"), rows(300, 0, curved=False), valid)
    mine, values = np.arange(300) < 200, np.full((300, 1), 40, np.float32)
    errors = ((values - valid.targets_nK) / 5) ** 2
    fitted = pass_of(valid, values, float(errors.sum())).answered_by(head, mine)
    own = ((predictions_of(head, valid.features_nF) - valid.targets_nK) / 5) ** 2
    assert fitted.sums[2] == pytest.approx(float(errors[~mine].sum() + own[mine].sum()), rel=1e-4)
    assert (fitted.values_nK[~mine] == 40).all()
