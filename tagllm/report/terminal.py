"""One table of all runs below a folder, in the terminal: `python -m tagllm.report.terminal runs/quickstart`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tagllm.digits import digits
from tagllm.report.collect import Run, curve, headline, read_run


def table_of(folder: Path) -> Table:
    """Held-out results of each run with its baselines and controls on the same rows, and what training took."""
    table = Table(title=f"Held-out results of {folder}", title_justify="left")
    for name in ("run", "metric", "tag", "baselines and controls", "spearman", "rows", "train", "peak memory"):
        table.add_column(name, overflow="fold")
    for file in sorted(folder.glob("*/results.json")):
        table.add_row(*_row(read_run(file.parent)))
    return table


def _row(run: Run) -> list[str]:
    (first, metrics), *others = run.methods.items()
    name, results = headline({first: metrics}), run.results
    shown = "\n".join(f"{other} {digits(values[name], 4)}" for other, values in others if name in values)
    ranks = [f"{values['spearman']:.2f}" for values in run.methods.values() if "spearman" in values]
    peak = max(curve(run.log, "memory/peak_gib_all_ranks").values(), default=0.0)
    return [
        run.name, name, digits(metrics.get(name, math.nan), 4), shown, " / ".join(ranks),
        str(results["rows"]), f"{results['training']['seconds']:.0f} s", f"{peak:.1f} GiB",
    ]  # fmt: skip


if __name__ == "__main__":
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(Path(sys.argv[1])))
