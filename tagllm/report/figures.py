"""Figures of a report, as SVG text that stands in the page: it opens offline and stays sharp on a phone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tagllm.report.collect import ON_VALIDATION, Interval, Log, Run, curve
from tagllm.report.tags import cosine_of_means
from tagllm.tags import Tag

WIDTH, HEIGHT = 4.2, 3.2
MOST_POINTS = 2000
MOST_NAMED = 8
"""Curves of more combinations would be covered by their names."""
DARK = 0.6
"""From here on the heat map's colours take white text."""


def learning_curves(run: Run) -> str:
    """Empty where nothing was trained."""
    if not run.log:
        return ""
    figure, axes = _figure()
    for name, style in (("train/loss", "0.6"), ("valid/loss", "C1"), (ON_VALIDATION, "C0")):
        if points := curve(run.log, name):
            marker = "" if name == "train/loss" else "o"
            axes.plot([*points], [*points.values()], color=style, linewidth=1.2, marker=marker, label=name)
    axes.set(xlabel="step", ylabel="loss", title="learning curve")
    axes.legend()
    return _svg(figure)


def validation_curves(logs: Mapping[str, Sequence[Log]]) -> str:
    """A line per run of a sweep, a colour per combination; empty where nothing was trained."""
    figure, axes = _figure()
    for at, (label, runs) in enumerate(logs.items()):
        for number, log in enumerate(runs):
            points = curve(log, ON_VALIDATION)
            name = label if number == 0 and len(logs) <= MOST_NAMED else None
            axes.plot(
                [*points], [*points.values()], color=f"C{at % 10}", linewidth=1, marker="o", markersize=3, label=name
            )
    if not any(len(line.get_xdata()) for line in axes.lines):
        return ""
    axes.set(xlabel="step", ylabel="loss on validation, refitted", title="learning curves")
    if 1 < len(logs) <= MOST_NAMED:
        axes.legend(fontsize=7)
    return _svg(figure)


def predicted_against_true(run: Run) -> list[str]:
    """Of the first output of each head that answers with numbers."""
    figures = []
    for name, values_nK in run.pairs.items():
        head = name.removesuffix("values_nK")
        if head != name and f"{head}mse" in run.results["metrics"]:
            figures.append(_against_true(head, values_nK[:, 0], run.pairs[f"{head}targets_nK"][:, 0]))
    return figures


def _against_true(head: str, values_n: Tensor, targets_n: Tensor) -> str:
    """Evenly drawn rows, if there are very many; empty where none is labelled."""
    known_n = targets_n.isfinite().nonzero().flatten()
    if not len(known_n):
        return ""
    known_n = known_n[torch.linspace(0, len(known_n) - 1, min(len(known_n), MOST_POINTS)).long()]
    figure, axes = _figure()
    axes.scatter(targets_n[known_n], values_n[known_n], s=8, alpha=0.4, linewidths=0)
    low, high = float(targets_n[known_n].min()), float(targets_n[known_n].max())
    axes.plot([low, high], [low, high], color="0.4", linewidth=1, linestyle="--")
    axes.set(xlabel="true", ylabel="predicted", title=f"{head.replace('/', ', ')}held-out rows ({len(known_n)})")
    return _svg(figure)


def tag_similarity(tags: Sequence[Tag]) -> str:
    """Cosine of the mean rows of each two tags; empty where none has rows."""
    names, cosine = cosine_of_means(tags)
    if not names:
        return ""
    figure, axes = _figure()
    image = axes.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for at in range(len(names)):
        for other in range(len(names)):
            color = "white" if cosine[at, other].abs() > DARK else "black"
            axes.text(other, at, f"{cosine[at, other]:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_title("cosine of mean rows")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return _svg(figure)


def dots(metric: str, values: Mapping[str, tuple[float, Interval | None]]) -> str:
    """A dot per combination of a sweep, with its interval."""
    figure, axes = _figure(0.9 + 0.28 * len(values))
    for at, (mean, interval) in enumerate(values.values()):
        if interval is not None:
            axes.plot(interval, [at, at], color="C0", linewidth=1.5)
        axes.plot([mean], [at], color="C0", marker="o")
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=metric, title="mean and 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def changes(metric: str, values: Mapping[str, float]) -> str:
    """A bar per ablation, and a line where nothing was changed (the first value)."""
    figure, axes = _figure(0.9 + 0.25 * len(values))
    first, *_ = values.values()
    axes.barh(list(values), list(values.values()), color="0.7", height=0.6)
    axes.axvline(first, color="C0", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel=metric, title="tags taken out, reordered, swapped")
    return _svg(figure)


def _figure(height: float = HEIGHT) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]
