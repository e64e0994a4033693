"""Tables of the report: what each cell holds, which of them is best, and what the paper has for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tagllm.digits import digits
from tagllm.evaluate.metric_kinds import kind_of
from tagllm.report.collect import Interval, Metrics, metrics_of
from tagllm.report.paper import Published

MeansAndSpread = tuple[dict[str, Metrics], dict[str, dict[str, Interval]]]
"""By method."""


class Cell(NamedTuple):
    value: float | None
    interval: Interval | None = None
    best: bool = False

    def __str__(self) -> str:
        return f"{self.number} ({self.bounds})" if self.bounds else self.number

    @property
    def number(self) -> str:
        return "" if self.value is None else digits(self.value, 4)

    @property
    def bounds(self) -> str:
        return "–".join(digits(end, 3) for end in self.interval or ())


class Table(NamedTuple):
    title: str
    corner: str
    columns: list[str]
    rows: dict[str, list[Cell]]


def table_of(
    title: str, corner: str, rows: Mapping[str, Metrics], intervals: Mapping[str, Mapping[str, Interval]]
) -> Table:
    columns = metrics_of(dict(rows))
    best = {name: _best(name, [metrics[name] for metrics in rows.values() if name in metrics]) for name in columns}
    cells = {}
    for method, metrics in rows.items():
        some = intervals.get(method, {})
        cells[method] = [Cell(metrics.get(name), some.get(name), metrics.get(name) == best[name]) for name in columns]
    return Table(title, corner, columns, cells)


def _best(metric: str, values: Sequence[float]) -> float:
    return max(values) if kind_of(metric).higher_is_better else min(values)


def table_of_prompts(metric: str, cases: Mapping[str, MeansAndSpread]) -> Table:
    prompts = dict.fromkeys(p for means, _ in cases.values() for p, metrics in means.items() if metric in metrics)
    rows = {}
    for case, (means, spread) in cases.items():
        known = {prompt: metrics[metric] for prompt, metrics in means.items() if metric in metrics}
        best = {prompt for prompt, value in known.items() if value == _best(metric, list(known.values()))}
        rows[case] = [Cell(known.get(p), spread.get(p, {}).get(metric), p in best) for p in prompts]
    return Table(metric, "case", list(prompts), rows)


def with_paper(table: Table, paper: Published | None, first: str = "") -> Table:
    """With what the paper has for the same rows beside its metric; `first` is the row of the tag."""
    if paper is None or paper.metric not in table.columns:
        return table
    at = table.columns.index(paper.metric) + 1
    beside = {of: Cell(paper.beside("tag" if of == first else of)) for of in table.rows}
    rows = {of: [*cells[:at], beside[of], *cells[at:]] for of, cells in table.rows.items()}
    return table._replace(columns=[*table.columns[:at], f"{paper.metric} in the paper", *table.columns[at:]], rows=rows)
