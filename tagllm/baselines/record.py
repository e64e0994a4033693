"""RUN/baselines/METHOD.json: what was tried and found, written as it is found; and its way into results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tagllm.errors import UserError
from tagllm.files import RunLock, json_bytes, read_json, replace_file, write_durably

FOLDER = "baselines"


class Record:
    """One method on one run.

    `tuning`: what came of each learning rate on validation; `final`: metrics on the test rows by rate and seed.

    Raises:
        UserError: the file is damaged, or of other settings.
    """

    def __init__(self, run: Path, method: str, name: str, settings: dict[str, Any]) -> None:
        self.path = run / FOLDER / f"{method}.json"
        self.document: dict[str, Any] = {"name": name, "settings": settings, "tuning": {}, "final": {}}
        if self.path.is_file():
            self.document = read_json(self.path)
            held = self.document["settings"]
            if other := [key for key in settings if held.get(key) != settings[key]]:
                told = ", ".join(f"{key} {held.get(key)} and not {settings[key]}" for key in other)
                raise UserError(
                    f"{self.path}: was made with {told}; results of both cannot stand in one file. Give the same "
                    "settings, or remove it."
                )

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
        _write(self.path, self.document)


def add_trained(results: dict[str, Any], run: Path) -> None:
    """Puts the finished baselines of a run beside its other ones. They were scored on its test rows, so results of
    another split or config get none."""
    for file in sorted((run / FOLDER).glob("*.json")):
        found = read_json(file)
        digest = found["settings"]["config_digest"]
        if "metrics" in found and results["split"] == "test" and results["config_digest"] == digest:
            results["baselines"][found["name"]] = found["metrics"]
            results.setdefault("baseline_intervals", {})[found["name"]] = found["intervals"]


def update_results(run: Path) -> None:
    """RUN/results.json, if `tagllm eval` has written it already. Other methods may end at the same time."""
    file = run / "results.json"
    with RunLock(run / FOLDER, wait=True):
        if file.is_file():
            results = read_json(file)
            add_trained(results, run)
            _write(file, results)


def _write(file: Path, value: dict[str, Any]) -> None:
    temporary = file.with_name(f".tmp-{file.name}")
    write_durably(temporary, json_bytes(value))
    replace_file(temporary, file)
