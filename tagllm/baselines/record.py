"""RUN/baselines/METHOD.json: what was tried and found, written as it is found; and its way into results.json."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tagllm.baselines.methods import Method
from tagllm.errors import UserError
from tagllm.files import RunLock, json_bytes, read_json, write_whole
from tagllm.origin import ORIGIN

FOLDER = "baselines"
COMES_FROM = (*ORIGIN, "lr", "lr_at_edge", "tried", "seeds", "steps", "best_steps", "seconds", "each", "settings")
"""What stands beside the metrics. `tried`: the loss on validation of each learning rate, nothing where one was given;
`steps`, `best_steps`, `seconds` and `each` (metrics) are those of each seed."""


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
        return _title(self.document)

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


def write_results(run: Path, results: dict[str, Any]) -> None:
    """RUN/results.json, with the trained baselines that are finished by now put into `results` beside the other ones.
    These were scored on the test rows, so results of another split or config get none."""
    with RunLock(run / FOLDER, wait=True) if (run / FOLDER).is_dir() else nullcontext():
        _write_results(run, results)


def update_results(run: Path) -> None:
    """RUN/results.json, if `tagllm eval` has written it already."""
    with RunLock(run / FOLDER, wait=True):  # `eval` or other methods may end at the same time
        if (run / "results.json").is_file():
            _write_results(run, read_json(run / "results.json"))


def _write_results(run: Path, results: dict[str, Any]) -> None:
    for file in sorted((run / FOLDER).glob("*.json")):
        found = read_json(file)
        name, digest = found["name"], found["settings"]["config_digest"]
        if "metrics" in found and results["split"] == "test" and results["config_digest"] == digest:
            at = f"{found['tag']}/" if found.get("tag") else ""
            for part, kept in (("baselines", "metrics"), ("baseline_intervals", "intervals")):
                of_head = {f"{at}{metric}": value for metric, value in found[kept].items()}
                results.setdefault(part, {}).setdefault(name, {}).update(of_head)
            told = {key: found[key] for key in COMES_FROM if key in found}  # records of before lack some
            results.setdefault("trained_baselines", {})[_title(found)] = told
    write_whole(run / "results.json", json_bytes(results))


def _title(document: dict[str, Any]) -> str:
    return f"{document['name']}, {document['tag']}" if document.get("tag") else str(document["name"])
