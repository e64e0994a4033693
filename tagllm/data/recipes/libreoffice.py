"""LibreOffice's help in eight languages: the same paragraphs, under the same ids, in one HTML page per topic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagllm.config import Split
from tagllm.data.recipes.recipe import RecipeRow, file_in, pair_key, whole_rows
from tagllm.errors import UserError

LANGUAGES = ("en", "fr", "ru", "de", "it", "el", "es", "pt")
_NAME = "libreoffice-help"
_PACKAGES = {"en": "en-us"}
"""Debian's, of languages that it calls otherwise."""
_SHORTEST = 20
"""Characters of English; below it are button names."""


def rows(origin: Path | None) -> Iterator[RecipeRow]:
    """From our own tables, or from the installed help."""
    folders = {language: _folder(origin, language) for language in LANGUAGES} if origin else {}
    if not any(folders.values()):
        splits: tuple[Split, ...] = ("train", "valid", "test")
        for split in splits:
            table = file_in(_NAME, origin, f"libreoffice_help.{split}.tsv.gz", f"libreoffice_help.{split}.tsv")
            for values in whole_rows(table):
                yield split, {**values, "key": pair_key(values["en"])}
        return
    if missing := [language for language, folder in folders.items() if folder is None]:
        raise UserError(
            f"recipe {_NAME}: {origin} has no {' '.join(missing)}; all eight languages are needed. "
            f"Run: apt install {' '.join(f'libreoffice-help-{_PACKAGES.get(code, code)}' for code in missing)}"
        )
    yield from _aligned({language: folder for language, folder in folders.items() if folder is not None})


def _folder(origin: Path, language: str) -> Path | None:
    names = ("en-US", "en") if language == "en" else (language,)
    return next((origin / name for name in names if (origin / name / "text").is_dir()), None)


def _aligned(folders: dict[str, Path]) -> Iterator[RecipeRow]:
    seen: set[str] = set()
    for page in sorted((folders["en"] / "text").rglob("*.html")):
        where = page.relative_to(folders["en"])
        if not all((folder / where).is_file() for folder in folders.values()):
            continue
        texts = {language: _paragraphs(folder / where) for language, folder in folders.items()}
        for name, english in texts["en"].items():
            row = {language: texts[language].get(name, "") for language in LANGUAGES}
            translated = all(text and (language == "en" or text != english) for language, text in row.items())
            if translated and len(english) >= _SHORTEST and english not in seen:
                seen.add(english)
                yield None, {**row, "key": pair_key(english)}


def _paragraphs(page: Path) -> dict[str, str]:
    """Texts of the paragraphs by id, without what only other systems or programs show."""
    from lxml import html

    tree: Any = html.parse(str(page))
    found = {}
    for paragraph in tree.iter("p"):
        name = paragraph.get("id") or ""
        if name.startswith("par_"):
            for hidden in paragraph.xpath(".//*[@hidden]"):
                hidden.drop_tree()
            found[name] = " ".join(paragraph.text_content().split())
    return found
