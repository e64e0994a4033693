"""One table of all runs below a folder: `python -m tagllm.evaluate.report runs/quickstart`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADLINE = ("mse", "cross_entropy", "output_nats", "span_nats")
"""The metric a run is known by: the first of these that it has. Lower is better for each."""


def report(folder: Path) -> Table:
    """Held-out results of each run with its baselines and controls on the same rows, and what training took."""
    table = Table(title=f"Held-out results of {folder}", title_justify="left")
    for name in ("run", "metric", "tag", "baselines and controls", "spearman", "rows", "train", "peak memory"):
        table.add_column(name, overflow="fold")
    for file in sorted(folder.glob("*/results.json")):
        table.add_row(*_row(file.parent, json.loads(file.read_text(encoding="utf-8"))))
    return table


def _row(run: Path, results: dict[str, Any]) -> list[str]:
    metrics = results["metrics"]
    name = next((key for key in HEADLINE if key in metrics), "none")
    others = {**results["baselines"], **results["controls"]}
    shown = "\n".join(f"{other} {values[name]:.4f}" for other, values in others.items() if name in values)
    ranks = [f"{metrics['spearman']:.2f}"] if "spearman" in metrics else [""]
    ranks += [f"{values['spearman']:.2f}" for values in others.values() if "spearman" in values]
    peak = max((line.get("memory/peak_gib_all_ranks", 0.0) for line in _logged(run)), default=0.0)
    return [
        run.name, name, f"{metrics.get(name, float('nan')):.4f}", shown, " / ".join(filter(None, ranks)),
        str(results["rows"]), f"{results['training']['seconds']:.0f} s", f"{peak:.1f} GiB",
    ]  # fmt: skip


def _logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    Console(width=None if sys.stdout.isatty() else 120).print(report(Path(sys.argv[1])))
