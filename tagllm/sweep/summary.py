"""What came of a sweep: mean and interval over the seeds of each combination; a file of JSON and lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tagllm.digits import digits
from tagllm.evaluate.seeds import over_seeds
from tagllm.files import json_bytes, read_json, write_whole, writing
from tagllm.origin import ORIGIN, origin
from tagllm.sweep.points import Sweep, written


class Summary(NamedTuple):
    """Of the seeds of one combination, as `over_seeds` says.

    `tried`: the loss on validation by value of the tuned key; `folders`: of the runs, first seed first. Of each of
    them `each` has the metrics, `notes` what there is to be said, `origins` the split, the command, commit and
    hardware that scored it, and those that trained it."""

    shown: dict[str, Any]
    runs: int
    metrics: dict[str, tuple[float, float | None]]
    tried: dict[str, float]
    folders: list[str]
    origins: list[dict[str, Any]]
    each: list[dict[str, Any]]
    notes: list[str]


def summaries(sweep: Sweep) -> list[Summary]:
    """Of the runs that are finished, by combination."""
    made = []
    for combination in sweep.combinations:
        tried = sweep.tried(combination)
        waiting = sweep.tuned is not None and not tried
        points = [] if waiting else [sweep.final(combination, seed) for seed in range(sweep.seeds)]
        done = [point for point in points if sweep.done(point)]
        results = [read_json(point.folder / "results.json") for point in done]
        metrics = over_seeds([one["metrics"] for one in results])
        shown = points[0].shown if points else combination.shown
        folders = [str(point.folder.relative_to(sweep.output)) for point in done]
        parts = (*ORIGIN, "training", "split", "config_digest", "scoring", "dtype")
        origins = [{part: one[part] for part in parts} for one in results]
        each, notes = [one["metrics"] for one in results], [one.get("note", "") for one in results]
        made.append(Summary(shown, len(done), metrics, tried, folders, origins, each, notes))
    return made


def write_summary(sweep: Sweep, found: Sequence[Summary]) -> None:
    """OUTPUT/sweep.json, or sweep_KEY.json of one that varies this key."""
    about = {"run": sweep.output.name, "seeds": list(range(sweep.seeds)), "tuned": sweep.tuned and sweep.tuned[0]}
    combinations = [summary._asdict() for summary in found]
    with writing(sweep.output):
        sweep.output.mkdir(parents=True, exist_ok=True)
        write_whole(sweep.output / sweep.name, json_bytes({**about, "combinations": combinations, **origin()}))


def describe(found: Sequence[Summary]) -> list[str]:
    """A line for each combination, for people: every metric's mean and 95 % interval."""
    names = [" ".join(f"{key}={written(value)}" for key, value in summary.shown.items()) for summary in found]
    width = max(map(len, names), default=0)
    lines = ["mean and 95 % interval over the seeds"]
    for name, summary in zip(names, found, strict=True):
        metrics = "  ".join(f"{metric} {_shown(*value)}" for metric, value in summary.metrics.items())
        runs = "1 run " if summary.runs == 1 else f"{summary.runs} runs"
        lines.append(f"  {name:<{width}}  {runs}  {metrics}".rstrip())
    return lines


def _shown(mean: float, half: float | None) -> str:
    return digits(mean, 4) if half is None else f"{digits(mean, 4)} ± {digits(half, 2)}"
