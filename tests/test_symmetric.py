"""Fields that may trade places: drug A with drug B is drug B with A."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tagllm.config import HeadConfig
from tagllm.errors import UserError
from tagllm.evaluate.choosing import Rows
from tagllm.evaluate.closed_form import fit_head, predictions_of
from tagllm.evaluate.kernel_ridge import Similarity
from tagllm.evaluate.kernel_widths import SOME_PENALTIES, _Trial
from tagllm.head import Head, States
from tagllm.kernel import Landmarks, similarity_parts

D = 5


def spec(**keys: object) -> HeadConfig:
    return HeadConfig.model_validate({"reads": "both", "pool": "each", "kernel": "anova", "symmetric": True, **keys})


def pairs_of(number: int, seed: int, among: tuple[int, int]) -> Rows:
    """Of drugs with these numbers and a cell line: their effects and how they act together, either of them first."""
    random = np.random.default_rng(seed)
    drugs = np.random.default_rng(0).normal(size=(40, D))
    one, other = random.integers(*among, size=(2, number))
    cell, last = random.normal(size=(2, number, D))
    a, b = drugs[one], drugs[other]
    y = np.sin(2 * a[:, 0]) + np.sin(2 * b[:, 0]) + 2 * a[:, 1] * b[:, 1] + cell[:, 0]
    features = np.concatenate([last, cell, a, b], axis=1) + 300
    return Rows(features.astype(np.float32), y[:, None].astype(np.float32))


def swapped(rows: Rows) -> Rows:
    last, cell, a, b = np.split(rows.features_nF, 4, axis=1)
    return Rows(np.concatenate([last, cell, b, a], axis=1), rows.targets_nK)


def test_states_that_trade_places_do_so_in_every_layer() -> None:
    found = States.of(spec(layers=[3, 7], lengths=True), (0, 1, 1))
    assert found.kinds == (0, 1, 2, 2, 4, 5, 5, 7, 8, 8)
    assert found.orders == (tuple(range(10)), (0, 1, 3, 2, 4, 6, 5, 7, 9, 8))
    assert States.of(spec(reads="mean"), (0, 1, 0, 1)).orders == tuple(
        (a, c, b, d) for (a, b), (c, d) in itertools.product([(0, 2), (2, 0)], [(1, 3), (3, 1)])
    )
    one = States.of(spec(symmetric=False), (0, 1, 1))
    assert one.kinds == (0, 1, 2, 3) and one.orders == ((0, 1, 2, 3),)
    assert States.of(spec().model_copy(update={"reads": "last"}), (0, 1, 1)).orders == ((0,),)


def test_more_orders_than_can_be_computed() -> None:
    assert len(States.of(spec(), (0, 0, 0, 0)).orders) == 24
    with pytest.raises(
        UserError, match=r"head.symmetric is true, but 5 fields stand behind one domain tag.* 120 orders"
    ):
        Head.new(spec(), D, (0, 0, 0, 0, 0))


def test_the_kernel_is_the_mean_over_orders_and_what_is_saved_answers_so() -> None:
    random = torch.Generator().manual_seed(0)
    x, z = (torch.randn(number, 4 * D, generator=random) for number in (30, 20))
    width_SD = torch.rand(3, D, generator=random)[[0, 1, 2, 2]] + 1
    similar = Similarity(width_SD, States.of(spec(), (0, 1, 1)).orders)
    turned = z.view(-1, 4, D)[:, [0, 1, 3, 2]].flatten(1)
    expected = sum(one for each in (z, turned) for one in similarity_parts(x, Landmarks.of(each, 4), width_SD)) / 2
    torch.testing.assert_close(similar(x, z), expected)
    torch.testing.assert_close(similar(x, turned), expected)
    weight_KM = torch.randn(2, 20, generator=random)
    torch.testing.assert_close(similar.kernel(z, weight_KM)(x), expected @ weight_KM.T, rtol=1e-4, atol=1e-4)


def test_widths_are_tried_on_the_kernel_that_is_fitted() -> None:
    """Also where the columns differ, since some drugs always stand first."""
    spread_S, unit_SD, orders = (0.3, 0.3, 4.0, 4.0), torch.full((4, D), 3.0), States.of(spec(), (0, 1, 1)).orders
    seen, unseen = (_lower_first(pairs_of(number, seed, (0, 40))) for number, seed in ((80, 1), (50, 2)))
    similar = Similarity(unit_SD / torch.tensor(spread_S).sqrt()[:, None], orders)
    x, z = (torch.from_numpy(rows.features_nF).double() for rows in (seen, unseen))
    mean = seen.targets_nK.mean()
    targets_nK, answers_mK = (torch.from_numpy(rows.targets_nK - mean).double() for rows in (seen, unseen))
    expected = []
    for penalty in SOME_PENALTIES:
        weight_nK = torch.linalg.solve(similar(x, x) + penalty * torch.eye(80), targets_nK)
        expected.append(float((similar(z, x) @ weight_nK - answers_mK).square().mean()))
    found = _Trial.of(seen, unseen, unit_SD, orders).errors(spread_S)
    assert found.held_out_P.tolist() == pytest.approx(expected, rel=1e-3)
    similar_nn, left = similar(x, x) + SOME_PENALTIES[int(np.argmin(expected))] * torch.eye(80), []
    for at in range(80):
        others = torch.arange(80) != at
        weight_nK = torch.linalg.solve(similar_nn[others][:, others], targets_nK[others])
        left.append(float((similar_nn[at, others] @ weight_nK - targets_nK[at]).square()))
    assert found.left_out == pytest.approx(np.mean(left), rel=1e-3)


def test_a_pair_that_stands_either_way_is_tried_once() -> None:
    """Or each would answer the other when that is left out."""
    orders = States.of(spec(), (0, 1, 1)).orders
    seen, unseen = pairs_of(80, 1, (0, 40)), pairs_of(50, 2, (0, 40))
    twice = Rows(*map(np.concatenate, zip(seen, swapped(seen), strict=True)))
    once = _Trial.of(seen, unseen, torch.full((4, D), 3.0), orders).once()
    found = _Trial.of(twice, unseen, torch.full((4, D), 3.0), orders).once()
    assert len(once.targets_nK) == 80
    torch.testing.assert_close(found.targets_nK, once.targets_nK)
    spread_S = (1.0, 0.6, 4.0, 4.0)
    assert found.errors(spread_S).left_out == pytest.approx(once.errors(spread_S).left_out, rel=1e-3)


def _lower_first(rows: Rows) -> Rows:
    turned = swapped(rows).features_nF
    is_lower_n1 = rows.features_nF[:, 2 * D : 2 * D + 1] < turned[:, 2 * D : 2 * D + 1]
    return Rows(np.where(is_lower_n1, rows.features_nF, turned), rows.targets_nK)


@pytest.mark.parametrize("landmarks", [300, 1000], ids=["landmarks", "every row"])
def test_what_was_seen_one_way_is_known_the_other(landmarks: int) -> None:
    """Training has the drugs of lower numbers first, the test all of them either way."""
    train, valid = pairs_of(700, 1, (0, 40)), pairs_of(300, 2, (0, 40))
    first = train.features_nF[:, 2 * D] < train.features_nF[:, 3 * D]
    train = Rows(np.where(first[:, None], train.features_nF, swapped(train).features_nF), train.targets_nK)
    test = pairs_of(1500, 3, (0, 40))
    found = {}
    for symmetric in (True, False):
        head = Head.new(spec(symmetric=symmetric, landmarks=landmarks), D, (0, 1, 1))
        head = replace(head, std_K=torch.tensor([float(train.targets_nK.std())]))
        fit = fit_head(head, train, valid)
        assert fit.kernel is not None
        answers = predictions_of(fit, test.features_nF)
        found[symmetric] = float(np.mean((answers - test.targets_nK) ** 2) / test.targets_nK.var())
        same = np.allclose(predictions_of(fit, swapped(test).features_nF), answers, atol=1e-2)
        assert same == symmetric
    assert found[True] < 0.7 * found[False]
