"""`tagllm baseline`: prompt tuning and LoRA on a run's own rows, the learning rate of each chosen on validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tagllm.baselines.adapt import ALPHA, RANK, Adapted, require_peft
from tagllm.baselines.methods import METHODS, Method
from tagllm.baselines.record import Record
from tagllm.baselines.task import Task, open_tasks, read_asked
from tagllm.baselines.train import LOOKS, Trained, see, train
from tagllm.digits import digits
from tagllm.errors import UserError, did_you_mean
from tagllm.evaluate.closed_form import FIT_ROWS, predictions_of
from tagllm.evaluate.metrics import intervals, value_metrics
from tagllm.evaluate.results import FOLDER, update_results
from tagllm.evaluate.seeds import bounds, over_seeds
from tagllm.head import Head
from tagllm.launched import require_alone
from tagllm.origin import origin, peak_memory_gib
from tagllm.run_lock import RunLock
from tagllm.side_by_side import Script, run_side_by_side

FURTHER = 2
"""Rates beyond those of a method, while the best is at the edge."""


class Request(NamedTuple):
    """`methods`: all that fit the run if empty. `rates`: those of the method if empty. `budget_s`: seconds of one
    training, those of the run's own times its GPUs if None; tuning gets `tune_share` of it. `seeds`: final trainings,
    from the run's seed on. `virtual`: rows of prompt tuning, those of the run's function tags if None. `fit_rows`:
    training rows that a head is fitted on in closed form, at most; as many as the run's own fits see if None."""

    methods: Sequence[str]
    rates: Sequence[float]
    budget_s: float | None
    tune_share: float
    seeds: int
    virtual: int | None
    fit_rows: int | None


def read_rates(text: str) -> list[float]:
    """`1e-3,3e-3` -> numbers; none for an empty text."""
    try:
        rates = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        rates = [math.nan]
    if not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"--lr is {text!r}; it must be numbers above 0 with commas between them, as in 1e-3,3e-3.")
    return rates


def run_baselines(run: Path, request: Request, jobs: int = 1) -> None:
    """Trains what is not done yet and writes RUN/baselines/METHOD.json (and RUN/results.json, if it is there). With
    `jobs`, so many methods at a time, each in a process of its own.

    Raises:
        UserError: an unknown method, a run that has nothing to compare, other settings than before, several ranks.
    """
    if unknown := [name for name in request.methods if name not in METHODS]:
        raise UserError(f"--method: {unknown[0]!r} is no method. {did_you_mean(unknown[0], METHODS)}")
    require_alone("baseline")
    require_peft()
    methods = _methods(run, request.methods)
    if jobs > 1:  # of one method too: the run had its share of the cores for the same seconds
        if failed := run_side_by_side([_alone(run, method, request) for method in methods], jobs):
            raise UserError(*failed)
        return
    tasks = open_tasks(run)
    for method in methods:
        with RunLock(run / FOLDER / method.key):
            for task in tasks:
                _compare(task, method, request)
        update_results(run)


def _methods(run: Path, names: Sequence[str]) -> list[Method]:
    has_domain = read_asked(run).has_domain
    if "lora_text" in names and not has_domain:
        raise UserError(
            f"--method lora_text: {run} has no domain tag whose name could stand as text; it would be lora again. "
            "Leave it out."
        )
    return [m for m in METHODS.values() if m.key in names or (not names and (has_domain or not m.names_domains))]


def _alone(run: Path, method: Method, request: Request) -> Script:
    """The command that trains one of the methods."""
    given = {
        "--lr": ",".join(map(str, request.rates)) or None, "--budget-s": request.budget_s,
        "--tune-share": request.tune_share, "--seeds": request.seeds, "--virtual": request.virtual,
        "--fit-rows": request.fit_rows,
    }  # fmt: skip
    options = [f"{option}={value}" for option, value in given.items() if value is not None]
    return Script(f"{run}, {method.name}", [["baseline", str(run), f"--method={method.key}", *options]])


def _compare(task: Task, method: Method, request: Request) -> None:
    """One method on the rows of one head: every rate on validation, if there is a choice, then the best one in full,
    then (only then) the test rows. Of several seeds metrics are the mean and intervals are Student's t; of one,
    intervals are over the rows."""
    budget_s = task.seconds if request.budget_s is None else request.budget_s
    virtual = request.virtual or task.virtual
    learns = {"virtual": virtual, "init": "SAMPLE_VOCAB"} if method.virtual else {"rank": RANK, "alpha": ALPHA}
    settings = {"config_digest": task.digest, "budget_s": budget_s, "tune_share": request.tune_share}
    settings |= {"fit_rows": request.fit_rows, **learns}
    record = Record(task.run, method, task.tag, settings)
    if method.virtual and not virtual:
        raise UserError(
            f"--method {method.key}: the function tag of {task.run} is absent, so there is no number of rows to take "
            "over. Give one with --virtual."
        )
    longest = max(len(row.ids) for row in task.rows("train", method)) if method.virtual else 0
    if longest + virtual > task.backbone.max_tokens:
        raise UserError(
            f"--virtual is {virtual}; with the longest prompt of {longest} tokens that is more than the "
            f"{task.backbone.max_tokens} the backbone takes. Take {task.backbone.max_tokens - longest} at most."
        )
    losses = {} if len(request.rates) == 1 else _tuned(task, method, record, request, budget_s)
    best = min(losses, key=losses.__getitem__, default=next(iter(request.rates), method.rates[0]))
    at_edge = bool(losses) and best in (min(losses), max(losses))
    if at_edge:
        print(f"{record.title}: {best:g} is the {'lowest' if best == min(losses) else 'highest'} rate tried; see --lr")
    finals = [_final(task, method, record, best, task.config.seed + k) for k in range(request.seeds)]
    of_seeds = over_seeds([one["metrics"] for one in finals])
    metrics = {name: mean for name, (mean, _) in of_seeds.items()}
    record.finish(
        {
            "lr": best, "lr_at_edge": at_edge, "tried": {f"{rate:g}": loss for rate, loss in losses.items()},
            "seeds": request.seeds, "metrics": metrics, "each": [one["metrics"] for one in finals],
            "steps": [one["steps"] for one in finals], "best_steps": [one["best_step"] for one in finals],
            "seconds": [one["seconds"] for one in finals],
            "intervals": finals[0]["intervals"] | bounds(of_seeds), **origin(), "peft": metadata.version("peft"),
            "dtype": task.backbone.dtype,
        }
    )  # fmt: skip
    shown = "  ".join(f"{name} {digits(value, 4)}" for name, value in metrics.items())
    print(f"{record.title}: lr {best:g}  test: {shown}  {_pace(finals[0])}", flush=True)


def _tuned(task: Task, method: Method, record: Record, request: Request, budget_s: float) -> dict[float, float]:
    """The loss on validation at each rate. Where nobody named the rates, FURTHER ones are tried while the best is at
    the edge."""
    losses: dict[float, float] = {}
    wanted = sorted(request.rates or method.rates)
    while wanted:
        rate = wanted.pop(0)
        entry = record.entry("tuning", str(rate))
        if entry is None:
            seconds = budget_s * request.tune_share
            _, trained, _ = _train(task, method, record.document["settings"], rate, seconds, task.config.seed, looks=1)
            entry = trained._asdict()
            record.add("tuning", str(rate), entry)
        losses[rate] = entry["valid_loss"]
        print(f"{record.title}: lr {rate:g}  valid loss {entry['valid_loss']:.4f}  {_pace(entry)}", flush=True)
        best = min(losses, key=losses.__getitem__)
        if not wanted and not request.rates and len(losses) < len(method.rates) + FURTHER:
            wanted = [beside for beside in _beside(best) if beside not in losses and best in (min(losses), max(losses))]
    return losses


def _beside(rate: float) -> tuple[float, float]:
    """The rates next to one on the ladder 1e-4, 3e-4, 1e-3, 3e-3 and so on."""
    digit, power = f"{rate:.0e}".split("e")
    first = digit == "1"
    down, up = f"{3 if first else 1}e{int(power) - first}", f"{3 if first else 1}e{int(power) + (not first)}"
    return float(down), float(up)


def _final(task: Task, method: Method, record: Record, rate: float, seed: int) -> dict[str, Any]:
    """Trained in full and scored on the test rows; intervals are over these."""
    key = f"lr={rate},seed={seed}"
    entry = record.entry("final", key)
    if entry is None:
        settings = record.document["settings"]
        model, trained, head = _train(task, method, settings, rate, settings["budget_s"], seed)
        test = see(model, task.rows("test", method), task.config.evaluation.rows_per_batch).rows(head.spec.reads)
        pair = predictions_of(head, test.features_nF), test.targets_nK
        about = bool(head.spec.classes), task.config.data.sources[0].target
        entry = trained._asdict() | {
            "metrics": value_metrics(*pair, *about), "intervals": intervals(*pair, *about),
            "test_rows": len(test.targets_nK), **peak_memory_gib(),
        }  # fmt: skip
        record.add("final", key, entry)
    return entry


def _train(
    task: Task, method: Method, settings: dict[str, Any], rate: float, budget_s: float, seed: int, looks: int = LOOKS
) -> tuple[Adapted, Trained, Head]:
    model = Adapted(task.backbone.model, method, task.head, settings.get("virtual", 0), seed)
    return model, *train(model, task, method, rate, budget_s, seed, settings["fit_rows"] or FIT_ROWS, looks)


def _pace(entry: dict[str, Any]) -> str:
    seconds, steps = entry["seconds"], entry["steps"]
    return f"({steps} steps in {seconds:.0f} s, {seconds / steps:.2f} s each)"
