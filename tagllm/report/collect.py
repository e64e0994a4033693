"""What folders tell, read once for tables and figures: runs that eval scored, cases of compose, sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from tagllm.config import flat
from tagllm.errors import UserError
from tagllm.evaluate.metric_kinds import KINDS, without_head
from tagllm.files import load_tensors, read_json, read_json_lines, read_yaml
from tagllm.run_folder import RunFolder
from tagllm.tags import TagLibrary

Metrics = dict[str, float]
Log = list[dict[str, float]]
"""Scalars of each logged step."""
Interval = tuple[float, float]
ALWAYS = ("split", "rows", "metrics", "intervals", "baselines", "controls", "learned", "backbone", "dtype")
"""What results have of whatever they are."""
ON_VALIDATION = "valid/loss_refitted"
"""The scalar by which the best step is chosen."""


class Run(NamedTuple):
    """A run, or a case of compose (which has no log, no library and no pairs)."""

    name: str
    results: dict[str, Any]
    config: str
    """As YAML."""
    log: Log
    library: TagLibrary | None
    pairs: dict[str, Tensor]
    """`values_nK` and `targets_nK` of the held-out rows, with the name of the head in front where there are several."""
    answers: list[dict[str, str]]
    """What was generated: prompt, reference, generated."""

    @property
    def first(self) -> str:
        """What the others are compared with."""
        return str(self.results.get("prompt", "tag"))

    @property
    def settings(self) -> dict[str, Any]:
        """The config; empty where only the results were kept."""
        found: dict[str, Any] | None = yaml.safe_load(self.config)
        return found or {}

    @property
    def recipes(self) -> set[str]:
        """Named data sets that its rows are of."""
        of_cases = [case["source"] for case in self.settings.get("cases", {}).values()]
        sources = [*(self.settings.get("data") or {}).get("sources", ()), *of_cases]
        return {source["recipe"] for source in sources if source.get("recipe")}

    @property
    def methods(self) -> dict[str, Metrics]:
        """The first one, then baselines and controls on the same rows."""
        return {self.first: self.results["metrics"], **self.results["baselines"], **self.results["controls"]}

    @property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """95 % bootstrap intervals by method, of those that have some."""
        more = [self.results.get(part, {}) for part in ("baseline_intervals", "control_intervals")]
        return {self.first: self.results["intervals"], **more[0], **more[1]}


class Composed(NamedTuple):
    """All cases of a compose config, each with the tags of one or several seeds."""

    name: str
    cases: list[list[Run]]


class Swept(NamedTuple):
    """A sweep; `example` is the first run of its first combination, `others` what stands beside the runs of that
    combination, by method: the metrics of each seed that has it. By combination, `logs` are those of its runs and
    `configs` is that of the first one."""

    name: str
    document: dict[str, Any]
    example: Run | None
    others: dict[str, list[Metrics]]
    logs: list[list[Log]]
    configs: list[str]


def collect(path: Path) -> list[Run | Composed | Swept]:
    """Reads all that a folder holds: a run that `tagllm eval` has scored, sweeps, and cases of compose (for several
    seeds in folders seed=0, seed=1 and so on).

    Raises:
        UserError: it holds none of them, or a file is damaged.
    """
    is_scored = (RunFolder(path).scored() / "results.json").is_file()
    found: list[Run | Composed | Swept] = [read_run(path)] if is_scored else []
    found += [_swept(file) for file in sorted(path.glob("sweep*.json"))]
    for folders in ([path], sorted(path.glob("seed=*"))):
        files = [file for folder in folders for file in sorted(folder.glob("*/results.json"))]
        cases: dict[str, list[Run]] = {}
        for file in files:
            if "prompt" in read_json(file):
                cases.setdefault(file.parent.name, []).append(read_run(file.parent))
        if cases:
            for runs in cases.values():
                _require_one_question(runs, path)
            found.append(Composed(path.name, list(cases.values())))
    if not found:
        raise UserError(_nothing_in(path))
    return found


def _nothing_in(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: is no folder. Name that of a run, a sweep or a compose."
    if (path / "config.yaml").is_file():
        return f"{path}: is a run without results. Score it first: tagllm eval {path}"
    runs = sorted(str(file.parent) for file in path.glob("*/config.yaml"))
    there = f"; it holds {', '.join(runs[:5])}{' and others' if len(runs) > 5 else ''}, name these" if runs else ""
    return f"{path}: holds no run, sweep or compose that was scored{there}."


def _swept(file: Path) -> Swept:
    path, document = file.parent, read_json(file)
    first: dict[str, Any] = next((one for one in document["combinations"] if one["folders"]), {"folders": []})
    done: list[str] = first["folders"]
    others: dict[str, list[Metrics]] = {}
    for at, folder in enumerate(done):
        results = _results(path / folder / "results.json")
        _require_as_then(path / folder, results, first["origins"][at], file)
        for method, metrics in {**results["baselines"], **results["controls"]}.items():
            others.setdefault(method, []).append(metrics)
    by_combination = [[path / folder for folder in one["folders"]] for one in document["combinations"]]
    logs = [[_lines(run / "metrics.jsonl") for run in runs] for runs in by_combination]
    configs = [_config(runs[0]) if runs else "" for runs in by_combination]
    return Swept(path.name, document, read_run(path / done[0]) if done else None, others, logs, configs)


def _require_as_then(run: Path, results: dict[str, Any], then: dict[str, Any], file: Path) -> None:
    """Raises UserError where a run was scored otherwise since its sweep was summed up: with quantised weights, say."""
    there, here = _scored(then), _scored(results)
    if other := [key for key in there if here.get(key) != there[key]]:
        told = ", ".join(f"{key} {here.get(key)!s:.12} and not {there[key]!s:.12}" for key in other)
        raise UserError(
            f"{run}/results.json: was scored anew since {file} was written ({told}), so the two cannot stand in one "
            "table. Start the same sweep again: it scores that run as before."
        )


def _scored(results: dict[str, Any]) -> dict[str, Any]:
    """Of which rows and how."""
    return {"split": results["split"], "config_digest": results["config_digest"], **results["scoring"]}


def _require_one_question(seeds: list[Run], path: Path) -> None:
    """Raises UserError where a case was asked of other rows or otherwise with the tags of another seed."""
    asked = [
        {
            "split": one.results["split"], "rows": one.results["rows"], "prompts": ", ".join(one.methods),
            "format": one.results["format"],
            **flat({key: value for key, value in one.settings.items() if key != "libraries"}),
        }
        for one in seeds
    ]  # fmt: skip
    for one in asked[1:]:
        keys = [key for key in dict.fromkeys([*asked[0], *one]) if asked[0].get(key) != one.get(key)]
        if other := [f"{key} {asked[0].get(key)} and {one.get(key)}" for key in keys]:
            raise UserError(
                f"{path}: {seeds[0].name} was not asked the same with the tags of each seed ({'; '.join(other)}), so "
                "there is no mean. Start tagllm compose again for each of them: what is scored as now is kept."
            )


def metrics_of(rows: dict[str, Metrics]) -> list[str]:
    """Those of the tables, in their order; of several heads, one head after the other."""
    there = sorted({name for metrics in rows.values() for name in metrics if without_head(name) in KINDS})
    return sorted(there, key=lambda name: (name.rpartition("/")[0], list(KINDS).index(without_head(name))))


def headline(rows: Mapping[str, Metrics]) -> str:
    """The metric that a table is known by."""
    there = metrics_of(dict(rows))
    return next(
        (name for name in ("mse", "chrf++", "cross_entropy", "output_nats") if name in there), there[0] if there else ""
    )


def curve(log: Log, name: str) -> dict[int, float]:
    """A scalar by step."""
    return {int(line["step"]): line[name] for line in log if name in line}


def read_run(path: Path) -> Run:
    """A run that `tagllm eval` has scored, or a case of compose."""
    scored = RunFolder(path).scored()
    pairs = load_tensors(scored / "held_out.safetensors") if (scored / "held_out.safetensors").is_file() else {}
    library = TagLibrary.load(path / "library") if (path / "library").is_dir() else None
    log, answers = _lines(path / "metrics.jsonl"), _lines(scored / "generated.jsonl")
    return Run(path.name, _results(scored / "results.json"), _config(path), log, library, pairs, answers)


def _results(file: Path) -> dict[str, Any]:
    """Of `eval`, or of a case of compose."""
    found = read_json(file)
    wanted = (*ALWAYS, "libraries" if "prompt" in found else "scoring")
    if missing := [key for key in wanted if key not in found]:
        raise UserError(f"{file}: has no {missing[0]}, as an earlier tagllm wrote it. Remove it and score anew.")
    return found


def _config(path: Path) -> str:
    """Empty where only the results were kept."""
    if not (path / "config.yaml").is_file():
        return ""
    return yaml.safe_dump(read_yaml(path / "config.yaml"), sort_keys=False, allow_unicode=True)


def _lines(file: Path) -> list[Any]:
    return read_json_lines(file) if file.is_file() else []
