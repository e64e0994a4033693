"""How long a run is and how the learning rate goes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagllm.config import OptimConfig
from tagllm.train.schedule import lr_factor, total_steps


def optim(**given: Any) -> OptimConfig:
    return OptimConfig(**({"steps": 10} if "epochs" not in given else {}) | given)


@pytest.mark.parametrize(
    ("epochs", "rows", "per_step", "steps"),
    [(1, 100, 10, 10), (1, 101, 10, 11), (2, 105, 10, 21), (0.5, 100, 10, 5), (1, 3, 32, 1), (0.001, 10, 10, 1)],
)
def test_a_started_step_is_finished(epochs: float, rows: int, per_step: int, steps: int) -> None:
    assert total_steps(optim(epochs=epochs, rows_per_step=per_step), rows) == steps


def test_given_steps_are_the_length() -> None:
    assert total_steps(optim(steps=7), 10_000) == 7


@given(st.integers(1, 50), st.integers(1, 1000), st.integers(1, 64))
def test_whole_epochs_see_every_row_and_no_step_more(epochs: int, rows: int, per_step: int) -> None:
    steps = total_steps(optim(epochs=epochs, rows_per_step=per_step), rows)
    assert (steps - 1) * per_step < epochs * rows <= steps * per_step


def test_warm_up_is_linear_and_reaches_the_full_rate() -> None:
    settings = optim(warmup_steps=4, schedule="constant")
    assert [lr_factor(settings, step, 10) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_linear() -> None:
    assert [lr_factor(optim(schedule="linear"), step, 4) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])


def test_cosine() -> None:
    found = [lr_factor(optim(warmup_steps=1), step, 5) for step in range(5)]
    assert found == pytest.approx([0.5, 1, 0.853553, 0.5, 0.146447], abs=1e-6)


@given(st.integers(1, 200), st.integers(0, 250), st.sampled_from(["cosine", "linear", "constant"]))
def test_every_step_learns_and_none_beyond_the_given_rate(total: int, warmup: int, schedule: str) -> None:
    factors = [lr_factor(optim(warmup_steps=warmup, schedule=schedule), step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    behind = factors[warmup:]
    assert behind == sorted(behind, reverse=True), "after the warm-up it never rises"
    assert factors[:warmup] == sorted(factors[:warmup])
