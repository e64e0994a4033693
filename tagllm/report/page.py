"""`tagllm report`: one HTML page that needs nothing else, and the same tables as Markdown and JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from tagllm.files import json_bytes, write_whole, writing
from tagllm.origin import origin
from tagllm.report.collect import collect
from tagllm.report.sections import Section, sections_of
from tagllm.report.tables import Table

NAME = "report"
_TEMPLATE = Path(__file__).parent / "page.html.jinja"


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Writes `output`/report.html, report.md and report.json.

    Raises:
        UserError: a run that was not scored, or a folder that cannot be written.
    """
    sections = [section for folder in folders for found in collect(folder) for section in sections_of(found)]
    document = {"sections": [section.document for section in sections], **origin()}
    pages = {"html": html(sections).encode(), "md": markdown(sections).encode(), "json": json_bytes(document)}
    with writing(output, "Give another folder with --out."):
        output.mkdir(parents=True, exist_ok=True)
        for kind, content in pages.items():
            write_whole(output / f"{NAME}.{kind}", content)
    return output / f"{NAME}.html"


def html(sections: Sequence[Section]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(sections=sections)


def _code(text: str) -> Markup:
    """What stands between backticks as code."""
    pieces = enumerate(re.split(r"`([^`\n]+)`", text))
    parts = [Markup("<code>{}</code>" if at % 2 else "{}").format(piece) for at, piece in pieces]
    return Markup("").join(parts)


def markdown(sections: Sequence[Section]) -> str:
    """The notes and tables alone."""
    texts = ([*map(_shown, (f"## {one.title}", *one.notes)), *map(_markdown_table, one.tables)] for one in sections)
    return "\n".join("\n\n".join(text) + "\n" for text in texts)


def _shown(text: str) -> str:
    """With the names of tags, which Markdown would take for tags of HTML; between backticks it takes nothing."""
    parts = text.split("`")
    return "`".join(part if at % 2 else part.replace("<", "\\<") for at, part in enumerate(parts))


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_shown(cell).replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"

    lines = [f"{_shown(table.title)}:\n"] if table.title else []
    lines += [line([table.corner, *table.columns]), f"|---|{'---:|' * len(table.columns)}"]
    for name, cells in table.rows.items():
        lines.append(line([name, *(f"**{cell}**" if cell.best and str(cell) else str(cell) for cell in cells)]))
    return "\n".join(lines)
