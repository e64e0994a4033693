"""RUN/baselines/METHOD.json: what was tried and found, written as it is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tagllm.baselines.methods import Method
from tagllm.errors import UserError
from tagllm.evaluate.results import FOLDER, title_of
from tagllm.files import json_bytes, read_json, write_whole


class Record:
    """One method on one run, or on the rows of one of its heads.

    `tuning`: what came of each learning rate on validation; `final`: metrics on the test rows by rate and seed.

    Raises:
        UserError: the file is damaged, or of other settings.
    """

    def __init__(self, run: Path, method: Method, tag: str, settings: dict[str, Any]) -> None:
        """`tag`: whose head, where there are several."""
        self.path = run / FOLDER / f"{'-'.join(filter(None, (method.key, tag)))}.json"
        about = {"name": method.name, "tag": tag, "settings": settings}
        self.document: dict[str, Any] = {**about, "tuning": {}, "final": {}}
        if self.path.is_file():
            self.document = read_json(self.path)
            held = self.document["settings"]
            if other := [key for key in settings if held.get(key) != settings[key]]:
                told = ", ".join(f"{key} {held.get(key)} and not {settings[key]}" for key in other)
                raise UserError(
                    f"{self.path}: was made with {told}; results of both cannot stand in one file. Give the same "
                    "settings, or remove it."
                )

    @property
    def title(self) -> str:
        return title_of(self.document)

    def entry(self, part: str, key: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.document[part].get(key)
        return found

    def add(self, part: str, key: str, entry: dict[str, Any]) -> None:
        self.document[part][key] = entry
        self._write()

    def finish(self, result: dict[str, Any]) -> None:
        self.document |= result
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        write_whole(self.path, json_bytes(self.document))
