"""results.json, written by `eval` and by `baseline`: each puts in what the other has found."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tagllm.files import json_bytes, read_json, write_whole, writing
from tagllm.origin import ORIGIN
from tagllm.run_lock import RunLock

FOLDER = "baselines"
COMES_FROM = (*ORIGIN, "lr", "lr_at_edge", "tried", "seeds", "steps", "best_steps", "seconds", "each", "settings")
"""What stands beside the metrics. `tried`: the loss on validation of each learning rate, nothing where one was given;
`steps`, `best_steps`, `seconds` and `each` (metrics) are those of each seed."""


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """FOLDER/results.json. In that of a run, the trained baselines that are finished by now are put into `results`
    beside the other ones. They were scored on the test rows with whole weights, so results of another split or config,
    or of quantised ones, get none."""
    with RunLock(folder / FOLDER, wait=True) if (folder / FOLDER).is_dir() else nullcontext():
        _write_results(folder, results)


def update_results(run: Path) -> None:
    """RUN/results.json, if `tagllm eval` has written it already."""
    with RunLock(run / FOLDER, wait=True):  # `eval` or other methods may end at the same time
        if (run / "results.json").is_file():
            _write_results(run, read_json(run / "results.json"))


def _write_results(run: Path, results: dict[str, Any]) -> None:
    comparable = results["split"] == "test" and results["scoring"]["backbone.quantize"] == "none"
    for file in sorted((run / FOLDER).glob("*.json")):
        found = read_json(file)
        name, digest = found["name"], found["settings"]["config_digest"]
        if comparable and "metrics" in found and results["config_digest"] == digest:
            at = f"{found['tag']}/" if found["tag"] else ""
            for part, kept in (("baselines", "metrics"), ("baseline_intervals", "intervals")):
                of_head = {f"{at}{metric}": value for metric, value in found[kept].items()}
                results.setdefault(part, {}).setdefault(name, {}).update(of_head)
            results.setdefault("trained_baselines", {})[title_of(found)] = {key: found[key] for key in COMES_FROM}
    with writing(run):
        write_whole(run / "results.json", json_bytes(results))


def title_of(document: dict[str, Any]) -> str:
    return f"{document['name']}, {document['tag']}" if document["tag"] else str(document["name"])
