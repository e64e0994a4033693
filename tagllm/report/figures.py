"""Figures of a report, as SVG text that stands in the page: it opens offline and stays sharp on a phone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from tagllm.report.collect import RunResult
from tagllm.report.tags import cosine_of_means
from tagllm.tags import Tag

WIDTH, HEIGHT = 4.2, 3.2
MOST_POINTS = 2000
DARK = 0.6
"""From here on the heat map's colours take white text."""


def learning_curves(run: RunResult) -> str:
    figure, axes = _figure()
    for name, style in (("train/loss", "0.6"), ("valid/loss", "C1")):
        steps, values = run.curve(name)
        if steps:
            axes.plot(steps, values, color=style, linewidth=1.2, marker="o" if name == "valid/loss" else "", label=name)
    axes.set(xlabel="step", ylabel="loss", title="learning curve")
    axes.legend()
    return _svg(figure)


def predicted_against_true(run: RunResult) -> str:
    """Of the first output; empty for classes or without a head."""
    if run.pairs is None or "mse" not in run.results["metrics"]:
        return ""
    values_n, targets_n = run.pairs["values_nK"][:, 0], run.pairs["targets_nK"][:, 0]
    known_n = targets_n.isfinite().nonzero().flatten()[:MOST_POINTS]
    figure, axes = _figure()
    axes.scatter(targets_n[known_n], values_n[known_n], s=8, alpha=0.4, linewidths=0)
    low, high = float(targets_n[known_n].min()), float(targets_n[known_n].max())
    axes.plot([low, high], [low, high], color="0.4", linewidth=1, linestyle="--")
    axes.set(xlabel="true", ylabel="predicted", title=f"held-out rows ({len(known_n)})")
    return _svg(figure)


def tag_similarity(tags: Sequence[Tag]) -> str:
    """Cosine of the mean rows of each two tags."""
    cosine = cosine_of_means(tags)
    figure, axes = _figure()
    image = axes.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu_r")
    names = [f"<{tag.name}>" for tag in tags]
    axes.set_xticks(range(len(tags)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(tags)), names)
    for at in range(len(tags)):
        for other in range(len(tags)):
            color = "white" if cosine[at, other].abs() > DARK else "black"
            axes.text(other, at, f"{cosine[at, other]:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_title("cosine of mean rows")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return _svg(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]
