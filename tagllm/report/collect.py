"""What the folder of a run tells, read once for tables and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from tagllm.errors import UserError
from tagllm.files import load_tensors, read_json
from tagllm.report.paper import PUBLISHED
from tagllm.tags import TagLibrary

HIGHER_IS_BETTER = ("r2", "pearson", "spearman", "concordance", "accuracy", "f1", "auroc", "bleu", "chrf++", "exact")
SHOWN = ("mse", "mae", *HIGHER_IS_BETTER, "cross_entropy", "span_nats", "output_nats")
"""Metrics of the tables, in this order."""


class RunResult(NamedTuple):
    name: str
    results: dict[str, Any]
    config: str
    """As YAML."""
    log: list[dict[str, float]]
    library: TagLibrary
    pairs: dict[str, Tensor] | None
    """`values_nK` and `targets_nK` of the held-out rows; None without a head."""

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        """Metrics by method: the tag first, then baselines and controls on the same rows."""
        found = {"tag": self.results["metrics"], **self.results["baselines"], **self.results["controls"]}
        return {name: {k: v for k, v in metrics.items() if k in SHOWN} for name, metrics in found.items()}

    @property
    def metrics(self) -> list[str]:
        there = {name for metrics in self.rows.values() for name in metrics}
        return [name for name in SHOWN if name in there]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals of the tag's metrics."""
        found = self.results.get("intervals", {})
        return {name: tuple(found[name]) for name in self.metrics if name in found}

    def best(self, metric: str) -> float:
        values = [metrics[metric] for metrics in self.rows.values() if metric in metrics]
        return max(values) if metric in HIGHER_IS_BETTER else min(values)

    @property
    def published(self) -> dict[str, tuple[str, dict[str, float]]]:
        return {tag: PUBLISHED[tag] for tag in self.results["learned"] if tag in PUBLISHED}

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a scalar."""
        lines = [(line["step"], line[name]) for line in self.log if name in line]
        return [step for step, _ in lines], [value for _, value in lines]


def collect(run: Path) -> RunResult:
    """Reads a run that `tagllm eval` has scored.

    Raises:
        UserError: it has not, or a file is damaged.
    """
    if not (run / "results.json").is_file():
        raise UserError(f"{run}: has no results.json. Score it first: tagllm eval {run}")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    pairs = load_tensors(run / "held_out.safetensors") if (run / "held_out.safetensors").is_file() else None
    shown = yaml.safe_dump(config, sort_keys=False)
    library = TagLibrary.load(run / "library")
    return RunResult(run.name, read_json(run / "results.json"), shown, list(map(json.loads, lines)), library, pairs)
