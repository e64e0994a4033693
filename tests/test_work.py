"""What is logged about the work of a step is what was done."""

from __future__ import annotations

import numpy as np

from tagllm.train.work import Work, work_of
from tests import tiny


def test_work_of_a_shared_and_remembered_batch() -> None:
    of = tiny.layout()
    random = np.random.default_rng(0)
    rows = [tiny.example(of, (4, "Frozen", "~20#1", 2, "Frozen", "~5", "F"), random) for _ in range(3)]
    tagged = tiny.model(of, remember=1 << 20)
    batch = tiny.collator(of)(rows)
    shared, own = 4 + 3 + 20 + 2 + 3, 5
    for computed in (shared + 3 * own, 0):
        tagged(batch)
        work = work_of([batch], tagged.take_computed())
        assert work == Work(live=3 * 3, frozen=3 * (shared + own), distinct=shared + 3 * own, computed=computed)
    assert work.flops_ratio == 9 / (9 + work.frozen)
    scalars = Work(10, 30, 15, 15).scalars(2.0)
    assert scalars["speed/tokens_per_second"] == 20
    assert scalars["speed/prefix_sharing_ratio"] == 0.5
    assert scalars["speed/flops_ratio"] == (2 * 15 + 4 * 10) / (4 * 40)
