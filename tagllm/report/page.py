"""`tagllm report`: one HTML page that needs nothing else, and the same tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tagllm.errors import UserError
from tagllm.files import replace_file, write_durably
from tagllm.report.collect import RunResult, collect
from tagllm.report.figures import learning_curves, predicted_against_true, tag_similarity

NAME = "report"
_TEMPLATE = Path(__file__).parent / "page.html.jinja"


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Writes `output`/report.html and report.md.

    Raises:
        UserError: a run that was not scored, or a folder that cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    found = [collect(run) for run in runs]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        runs=found, figures={run.name: _figures(run) for run in found}
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in ((f"{NAME}.html", page), (f"{NAME}.md", markdown(found))):
            write_durably(output / f".tmp-{name}", text.encode())
            replace_file(output / f".tmp-{name}", output / name)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error}. Give another folder with --out.") from None
    return output / f"{NAME}.html"


def markdown(runs: Sequence[RunResult]) -> str:
    """The tables alone."""
    parts = []
    for run in runs:
        parts.append(f"## {run.name}\n\n{caption(run)}\n\n| method | {' | '.join(run.metrics)} |")
        parts[-1] += f"\n|---|{'---|' * len(run.metrics)}\n"
        for method, metrics in run.rows.items():
            cells = [number(metrics.get(name)) for name in run.metrics]
            parts[-1] += f"| {method} | {' | '.join(cells)} |\n"
        for tag, (metric, values) in run.published.items():
            shown = ", ".join(f"{method} {value:g}" for method, value in values.items())
            parts[-1] += f"\nThe paper, `<{tag}>`, {metric} on its own rows: {shown}.\n"
    return "\n".join(parts)


def caption(run: RunResult) -> str:
    results = run.results
    return (
        f"{results['rows']} {results['split']} rows; {results['backbone']['name']}; learned: "
        f"{', '.join(f'<{tag}>' for tag in results['learned'])}; {results['date']}; "
        f"tagllm {results['versions']['tagllm']}, config {results['config_digest'][:12]}"
    )


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _figures(run: RunResult) -> list[str]:
    drawn = [learning_curves(run), predicted_against_true(run), tag_similarity(list(run.library.tags.values()))]
    return [figure for figure in drawn if figure]
