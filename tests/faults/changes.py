"""Faults 10, 11 and 12: numbers that are not, other numbers of ranks, another world on the second start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tagllm.train import checkpoint
from tests import tiny
from tests.faults.hooks import Order
from tests.faults.lab import Lab, Trial
from tests.faults.record import Record

NUMBERS, SIZES, WORLD = "10 numbers that are not finite", "11 other numbers of ranks", "12 a changed world"
SEQUENCE = (2, 1, 3, 2)


def sizes(lab: Lab, name: str = "sizes") -> tuple[Record, Trial]:
    """2 ranks, killed; 1, killed; 3, killed; 2 to the end; always in the middle of accumulation."""
    orders = [Order(at, "backward", 25 + 7 * at, "SIGKILL", 0, tuple(range(size))) for at, size in enumerate(SEQUENCE)]
    trial = lab.trial(name, *orders[:-1])
    for size in SEQUENCE:
        outcome = lab.once(trial, size)
    told = [] if outcome.status == [0, 0] else [f"left with {outcome.status}: {outcome.stderr}"]
    judged = lab.judged(SIZES, trial, tolerance=1e-6)
    return judged._replace(corruptions=[*judged.corruptions, *told]), trial


def loaded_moment(lab: Lab) -> Record:
    """A whole checkpoint with a NaN among its moments: refused with the way out, which then works."""
    trial = lab.trial("moment", Order(0, "rows", 14, "SIGTERM", 1, (1,)))
    lab.once(trial)
    newest = trial.run.checkpoints[-1]
    state, _ = checkpoint.load_newest(newest.parent)
    assert state is not None
    name = next(name for name in state.tensors if name.endswith("exp_avg"))
    state.tensors[name].view(-1)[0] = float("nan")
    shutil.rmtree(newest)
    checkpoint.save(newest.parent, state, keep=5)
    refused = lab.once(trial)
    told = _complaints(refused.stderr[0], refused.status, [name, "not finite", newest.name, "Remove"])
    shutil.rmtree(newest)
    again = lab.once(trial)
    told += [] if again.status == [0, 0] else [f"again: {again.status} {again.stderr}"]
    judged = lab.judged(NUMBERS, trial, every=10)  # the newest was taken away
    ours = ("was committed", f"step {state.step} was never saved")
    corruptions = [text for text in judged.corruptions if not text.endswith(ours)]
    return judged._replace(injected=judged.injected + 1, corruptions=[*corruptions, *told])


def infinite_gradient(lab: Lab) -> Record:
    """One micro-batch of one rank in step 7: skipped, counted, and the checkpoints before it stay good."""
    trial = lab.trial("inf", Order(0, "backward", 20, "inf", 1, (1,)))
    outcome = lab.once(trial)
    told = [] if outcome.status == [0, 0] else [f"left with {outcome.status}: {outcome.stderr}"]
    events = list(trial.history.of_rank_0("step"))
    if [event["step"] for event in events if not event["finite"]] != [7]:
        told.append("another step than the seventh was not finite")
    if events[6]["tags"] != events[5]["tags"] or events[7]["tags"] == events[6]["tags"]:
        told.append("the skipped step changed the tags")
    told += [f"{path.name}: {checkpoint.verify(path)}" for path in trial.run.checkpoints if checkpoint.verify(path)]
    return Record(NUMBERS, len(trial.history.faults), told)


def _edit_data(lab: Lab) -> None:
    lab.rows.write_text(lab.rows.read_text().replace("\nC", "\nN", 1))


def _other_backbone(lab: Lab) -> None:
    tiny.backbone(seed=1).save_pretrained(lab.backbone)


def _other_tokenizer(lab: Lab) -> None:
    path = lab.backbone / "tokenizer.json"
    text = path.read_text()
    swapped = text.replace('"C": ', '"@@": ').replace('"N": ', '"C": ').replace('"@@": ', '"N": ')
    assert swapped != text
    path.write_text(swapped)


def _older_format(lab: Lab) -> None:
    for found in lab.folder.glob("changed/run/checkpoints/step-*"):
        fixture = Path(__file__).parent / "checkpoint-of-format-0"
        shutil.copy(fixture / "manifest.json", found / "manifest.json")


CHANGES: dict[str, tuple[Callable[[Lab], None], list[str]]] = {
    "data": (_edit_data, ["data: the checkpoint of step", "this run has", "Restore the old data"]),
    "backbone": (_other_backbone, ["backbone: the checkpoint of step", "this run has", "Restore the old backbone"]),
    "tokenizer": (_other_tokenizer, ["tokenizer: the checkpoint of step", "this run has"]),
    "format": (_older_format, ["format is 0; this tagllm reads 1"]),
}


def changed(folder: Path, what: str) -> Record:
    """A run that was stopped, then a world in which it must not go on. The lab is its own: others want theirs whole."""
    change, wanted = CHANGES[what]
    lab = Lab(folder)
    trial = lab.trial("changed", Order(0, "rows", 14, "SIGTERM", 0, (0,)))
    lab.once(trial, 1)
    before = [path.name for path in trial.run.checkpoints]
    change(lab)
    refused = lab.once(trial, 1)
    told = _complaints(refused.stderr[0], refused.status, wanted)
    if [path.name for path in trial.run.checkpoints] != before:
        told.append("the checkpoints were touched")
    return Record(WORLD, 1, told)


def _complaints(said: str, status: list[int], wanted: list[str]) -> list[str]:
    missing = [f"{word!r} is not in {said!r}" for word in wanted if word not in said]
    return missing if set(status) == {2} else [*missing, f"left with {status}"]
