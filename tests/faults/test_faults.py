"""A seeded tenth of the faults; all of them: `python -m tests.faults`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.history import History, problems
from tests.faults.hooks import Order
from tests.faults.lab import Lab
from tests.faults.suite import Work, suite
from tests.faults.zygote import warm_ranks

SEED = 20
WORK = [pytest.param(work, id=f"{number}-{name}") for number, name, work in suite(0.1, SEED)]
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("faults")
    with warm_ranks(folder / "zygote"):
        yield Lab(folder)


@pytest.mark.parametrize("work", WORK)
def test_survives(lab: Lab, work: Work) -> None:
    record = work(lab)
    print(" | ".join(record.cells()))
    assert record.injected, "the fault never struck"
    assert not record.corruptions, "\n".join(record.corruptions)
    assert not record.hangs


def test_a_row_that_fails_in_one_rank_stops_all(lab: Lab) -> None:
    """The last rank alone meets it, in the middle of training; every rank says which row it was."""
    line = 31
    orders = [Order(0, "collate", 0, "raise", rank, (rank,), line) for rank in range(2)]
    trial = lab.trial("bad-row", *orders)
    outcome = lab.once(trial, engine__zero_stage=0)  # nothing looks at rows before training
    assert outcome.status == [2, 2], outcome.stderr
    assert len({fault["rank"] for fault in trial.history.faults}) == 1
    said = [text for text in outcome.stderr[0].splitlines() if text.startswith("error: ")]
    assert said and f"rows.csv, line {line}: cannot be made a batch: ValueError: ordered by the plan" in said[0]


def test_the_checker_finds_what_is_wrong(lab: Lab) -> None:
    """A history with one thing changed is told apart from the sound one."""
    sound = lab.undisturbed().history
    assert problems(sound, sound, 5) == []

    def spoiled(kind: str, **changes: object) -> History:
        starts = [{rank: [dict(event) for event in events] for rank, events in start.items()} for start in sound.starts]
        event = [event for event in starts[0][0] if event["event"] == kind][-2 if kind == "step" else -1]
        event.update(changes)
        return History(starts)

    assert problems(spoiled("step", tags="x"), sound, 5) == ["start 0: tags of step 39 differs"]
    assert problems(spoiled("step", rows=[]), sound, 5) == ["step 39 saw other rows"]
    assert "was never saved" in problems(spoiled("loaded", state="x"), sound, 5)[0]
    assert problems(spoiled("step", step=38), sound, 5)[-1] == "step 39 was never done"
