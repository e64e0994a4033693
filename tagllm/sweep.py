"""`tagllm sweep`: a config trained and scored for every combination of some values and several seeds, and one table.

Each run has a folder of its own below the config's `output`; what is finished is not done again, so a sweep that was
cut off goes on when it is started again, and several processes (a Slurm array) can take a part of the runs each.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.table import Table

from tagllm.config import load_config
from tagllm.errors import UserError
from tagllm.files import json_bytes, read_json, replace_file, write_durably

CONFIDENCE = 0.95


class Point(NamedTuple):
    """One run of a sweep."""

    values: dict[str, Any]
    """What the grid sets."""
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "results.json").is_file()

    def overrides(self) -> list[str]:
        chosen = [f"{key}={json.dumps(value)}" for key, value in self.values.items()]
        return [*chosen, f"seed={self.seed}", f"output={self.folder}"]


class Summary(NamedTuple):
    """Of the seeds of one combination: mean and half of the 95 % interval (Student's t; nan for one seed)."""

    values: dict[str, Any]
    runs: int
    metrics: dict[str, tuple[float, float]]


def points_of(path: Path, overrides: Sequence[str], grid: Sequence[str], seeds: int) -> list[Point]:
    """All runs, seeds innermost; every config is checked before the first one starts.

    Args:
        grid: `key=value,value,...` each; a value is YAML, so a list stands in brackets.

    Raises:
        UserError: a grid that cannot be read, or a combination that is no valid config.
    """
    axes = [_axis(text) for text in grid]
    output = Path(load_config(path, list(overrides)).output)
    points, problems = list[Point](), list[str]()
    for chosen in itertools.product(*(values for _, values in axes)):
        values = dict(zip((key for key, _ in axes), chosen, strict=True))
        for seed in range(seeds):
            point = Point(values, seed, output / _name(values, seed))
            points.append(point)
            try:
                load_config(path, [*overrides, *point.overrides()])
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return points


def run_point(path: Path, overrides: Sequence[str], point: Point) -> None:
    """Trains and scores one run, in processes of its own.

    Raises:
        UserError: one of them failed; its last line is in the message.
    """
    train = ["train", str(path), *overrides, *point.overrides()]
    for command in (train, ["eval", str(point.folder)]):
        ended = subprocess.run(
            [sys.executable, "-m", "tagllm", *command], stderr=subprocess.PIPE, text=True, check=False
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{point.folder}: tagllm {command[0]} left with {ended.returncode}: {last}")


def summaries(points: Sequence[Point]) -> list[Summary]:
    """Of the runs that are finished, by combination."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(json.dumps(point.values), []).append(point)
    made = []
    for group in found.values():
        results = [read_json(point.folder / "results.json")["metrics"] for point in group if point.done]
        names = [name for name, value in results[0].items() if isinstance(value, int | float)] if results else []
        metrics = {name: _interval([float(metrics[name]) for metrics in results]) for name in names}
        made.append(Summary(group[0].values, len(results), metrics))
    return made


def write_summary(output: Path, found: Sequence[Summary]) -> None:
    temporary = output / ".tmp-sweep.json"
    write_durably(temporary, json_bytes({"combinations": [summary._asdict() for summary in found]}))
    replace_file(temporary, output / "sweep.json")


def table_of(found: Sequence[Summary]) -> Table:
    """Mean and 95 % interval of each metric."""
    names = list(dict.fromkeys(name for summary in found for name in summary.metrics))
    keys = list(found[0].values)
    table = Table(title="mean and 95 % interval over the seeds")
    for title in (*keys, "runs", *names):
        table.add_column(title, justify="left" if title in keys else "right")
    for summary in found:
        cells = ["" if name not in summary.metrics else _shown(*summary.metrics[name]) for name in names]
        table.add_row(*(json.dumps(summary.values[key]) for key in keys), str(summary.runs), *cells)
    return table


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    try:
        parsed = yaml.safe_load(f"[{values}]") if equals and key else None
    except yaml.YAMLError:
        parsed = None
    if not parsed:
        raise UserError(f"--grid {text!r}: it must read key=value,value, as in tags.QED.length=1,5,10")
    return key, parsed


def _name(values: dict[str, Any], seed: int) -> str:
    parts = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return re.sub(r"[^A-Za-z0-9=._-]+", "-", "_".join([*parts, f"seed={seed}"]))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    from scipy.stats import sem, t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(sem(values) * t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))


def _shown(mean: float, half: float) -> str:
    return f"{mean:.4g}" if half != half else f"{mean:.4g} ± {half:.2g}"
