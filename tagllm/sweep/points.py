"""The runs of a sweep: a config for every variant, every combination of some values and several seeds, each at the
value of a tuned key that is best on validation."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tagllm.build import loaded_digest
from tagllm.config import RunConfig, Split, digest_of
from tagllm.config_file import load_config
from tagllm.contradictions import may_have
from tagllm.data.dataset import split_records
from tagllm.errors import UserError
from tagllm.files import cache_folder, read_json
from tagllm.run_folder import RunFolder, best_valid_loss, read_config
from tagllm.stage import read_stage

LONGEST_NAME = 200
"""Bytes; file systems take 255, `_seed=N` and what stands beside it while it is written come on top."""


class Point(NamedTuple):
    """One run of a sweep."""

    shown: dict[str, Any]
    """What tells it from the others: the name of its variant, the values of the grid and of the tuned key."""
    values: dict[str, Any]
    """What it sets."""
    seed: int
    folder: Path

    def overrides(self) -> list[str]:
        chosen = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.values.items()]
        return [*chosen, f"seed={self.seed}", f"output={self.folder}"]


class Combination(NamedTuple):
    """What all its seeds have in common: `shown` and `values` as in a `Point`, without the tuned key."""

    shown: dict[str, Any]
    values: dict[str, Any]


class Sweep(NamedTuple):
    """The runs in order: first seed 0 at every value of the tuned key (the trials, which are not scored: test rows are
    for what was chosen), then all seeds at the value that was best. Without a tuned key, all seeds of each
    combination."""

    path: Path
    overrides: Sequence[str]
    output: Path
    combinations: Sequence[Combination]
    seeds: int
    tuned: tuple[str, list[Any]] | None

    @classmethod
    def of(
        cls, path: Path, overrides: Sequence[str], grid: Sequence[str], seeds: int, variants: Path | None = None,
        tune: str | None = None,
    ) -> Sweep:  # fmt: skip
        """Every config is checked before the first one starts.

        Args:
            grid: `key=value,value,...` each; a value is YAML, so a list stands in brackets.
            variants: a YAML file of names, each with the keys and values that it sets.
            tune: `key=value,value,...` as well, of which each combination takes the best on validation.

        Raises:
            UserError: a grid or file that cannot be read, or a combination that is no valid config.
        """
        _refuse_own("overrides", {override.partition("=")[0] for override in overrides} - {"output"})
        axes, tuned = [_axis(text, "--grid") for text in grid], _axis(tune, "--tune") if tune else None
        keys = [key for key, _ in [*axes, *([tuned] if tuned else [])]]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(
                f"--grid, --tune: {twice} is given {keys.count(twice)} times. Give all of its values in one, as in "
                f"{twice}=A,B."
            )
        output = Path(load_config(path, list(overrides)).output)
        combinations = []
        for (name, own), *chosen in itertools.product(_variants(variants), *(values for _, values in axes)):
            values = dict(zip((key for key, _ in axes), chosen, strict=True))
            shown = {"variant": name} | values if variants else values
            combinations.append(Combination(shown, own | values))
        sweep = cls(path, overrides, output, combinations, seeds, tuned)
        sweep._check(variants)
        return sweep

    def _check(self, variants: Path | None) -> None:
        problems, folders = self._problems(self.config), [point.folder for point in self._first()]
        if len({*folders}) < len(folders):
            problems.append(
                f"--variants {variants}, --grid: two of them differ in signs only, and give one folder. Rename."
            )
        if problems:
            raise UserError(*problems)

    def require_stages(self) -> None:
        """Raises UserError with what `train` would say of any run before it loads a weight, or with a split that it is
        chosen by or scored on and no source has."""

        def look(point: Point) -> None:
            sources = read_stage(self.config(point), str(self.path)).config.data.sources
            wanted: list[Split] = ["test", "valid"] if self.tuned else ["test"]
            for split in wanted:
                if not any(may_have(source, split) for source in sources):
                    raise UserError(
                        f"{self.path}: no source has rows for {split} (split.{split} is 0 in all); a sweep scores on "
                        f"test and tunes on valid. Set split.{split}."
                    )

        if problems := self._problems(look):
            raise UserError(*problems)

    def _first(self) -> list[Point]:
        """A run of each combination, and of each value of the tuned key: other seeds differ in nothing that is read."""
        return [point for point in (self.trials() if self.tuned else self.finals()) if point.seed == 0]

    def _problems(self, look: Callable[[Point], object]) -> list[str]:
        """What `look` refuses, each mistake once, with the variants that have it in front."""
        of = dict[str, list[str]]()
        for point in self._first():
            try:
                look(point)
            except UserError as error:
                for problem in error.problems:
                    of.setdefault(problem, []).append(point.shown.get("variant", ""))
        named = {problem: ", ".join(filter(None, dict.fromkeys(names))) for problem, names in of.items()}
        return [f"{names}: {problem}" if names else problem for problem, names in named.items()]

    def config(self, point: Point) -> RunConfig:
        return load_config(self.path, [*self.overrides, *point.overrides()])

    def done(self, point: Point) -> bool:
        """Whether it is trained, and scored on the rows to test.

        Raises:
            UserError: it was scored in another way, or trained on other rows.
        """
        if not self.trained(point) or not (point.folder / "results.json").is_file():
            return False
        found, own = read_json(point.folder / "results.json"), read_config(point.folder)
        if found["split"] != "test" or found["config_digest"] != own.digest():
            return False
        asked, held = self.config(point).scoring(), found["scoring"]
        if other := [key for key in asked if held[key] != asked[key]]:
            told = ", ".join(f"{key} {held[key]} and not {asked[key]}" for key in other)
            raise UserError(
                f"{point.folder}: is trained already, and was scored with {told}. Give another output, or score it "
                f"anew: tagllm eval {point.folder} {' '.join(f'{key}={written(asked[key])}' for key in other)}"
            )
        return True

    def trained(self, point: Point) -> bool:
        """Whether its folder holds this very run, finished; `train` refuses what else it may hold.

        Raises:
            UserError: the data or a tag that is loaded changed since.
        """
        folder, config = RunFolder(point.folder), self.config(point)
        if not folder.is_finished:
            return False
        own = read_config(point.folder)
        if config.backbone.dtype == "auto":
            config = config.in_dtype(own.backbone.dtype)
        if own.digest() != config.digest():
            return False
        stage, then = read_stage(config, str(self.path)), folder.began_with()
        now = {"data": split_records(config.data, stage.templates, cache_folder()), "loaded tags": loaded_digest(stage)}
        if other := [key for key in now if then[key] != now[key]]:
            raise UserError(
                f"{point.folder}: is trained already, and the {' and the '.join(other)} changed since. "
                "Restore what was there, or give another output."
            )
        return True

    @property
    def name(self) -> str:
        """Of the file of what came of it, by what it varies: sweeps of one config stand side by side."""
        keys = dict.fromkeys(key for combination in self.combinations for key in combination.shown)
        return "_".join(["sweep", *keys, *(self.tuned or ())[:1]]) + ".json"

    @property
    def num_runs(self) -> int:
        return len(self.trials()) + len(self.combinations) * self.seeds

    def trials(self) -> list[Point]:
        return [point for combination in self.combinations for point in self._trials_of(combination)]

    def finals(self) -> list[Point]:
        """All seeds of each combination.

        Raises:
            UserError: the trials that choose their value are not finished.
        """
        return [self.final(combination, seed) for combination in self.combinations for seed in range(self.seeds)]

    def run_number(self, at: int) -> Point:
        """The run that a process of a Slurm array takes.

        Raises:
            UserError: there is none of that number, or it waits for trials.
        """
        if at >= self.num_runs:
            raise UserError(f"--only is {at}; the sweep has {self.num_runs} runs, counted from 0.")
        trials = self.trials()
        if at < len(trials):
            return trials[at]
        number, seed = divmod(at - len(trials), self.seeds)
        combination = self.combinations[number]
        for trial in self._trials_of(combination):  # with some of them missing another value might be best
            if not self.trained(trial):
                raise UserError(
                    f"--only {at}: trial {trial.folder} is not finished, and the value is chosen among all. Run it "
                    f"first (--only {trials.index(trial)}), or take it out of --tune if it cannot be."
                )
        return self.final(combination, seed)

    def tried(self, combination: Combination) -> dict[str, float]:
        """The loss on validation by value of the tuned key, of the trials that are finished and had a finite one."""
        if self.tuned is None:
            return {}
        key = self.tuned[0]
        trained = [point for point in self._trials_of(combination) if self.trained(point)]
        losses = {written(point.values[key]): best_valid_loss(point.folder) for point in trained}
        return {value: loss for value, loss in losses.items() if math.isfinite(loss)}

    def final(self, combination: Combination, seed: int) -> Point:
        """
        Raises:
            UserError: no trial is finished, and they choose its value.
        """
        if self.tuned is None:
            return self._point(combination, {}, seed)
        key, values = self.tuned
        tried = self.tried(combination)
        if not tried:
            raise UserError(
                f"--tune {key}: no trial of {combination.shown or 'the config'} is finished with a finite loss on "
                "validation; they choose its value."
            )
        best = min(values, key=lambda value: tried.get(written(value), math.inf))
        return self._point(combination, {key: best}, seed)

    def _trials_of(self, combination: Combination) -> list[Point]:
        if self.tuned is None:
            return []
        key, values = self.tuned
        return [self._point(combination, {key: value}, 0) for value in values]

    def _point(self, combination: Combination, more: dict[str, Any], seed: int) -> Point:
        shown = combination.shown | more
        return Point(shown, combination.values | more, seed, self.output / _name(shown, seed))


def _axis(text: str, option: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    try:
        parsed = yaml.safe_load(f"[{values}]") if equals and key else None
    except yaml.YAMLError:
        parsed = None
    if not parsed:
        raise UserError(f"{option} {text!r}: it must read key=value,value, as in tags.QED.length=1,5,10")
    _refuse_own(option, [key])
    return key, _as_json(parsed)


def _refuse_own(where: str, keys: Iterable[str]) -> None:
    """Raises UserError for keys that a sweep sets itself."""
    for key in keys:
        if key in ("seed", "output"):
            raise UserError(f"{where}: a sweep sets {key} itself. Use --seeds N, or an override output=FOLDER.")


def _as_json(value: Any) -> Any:
    """A value of YAML, its dates as they were written."""
    return json.loads(json.dumps(value, default=str))


def _variants(file: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """Names and what they set; without a file one of no name that sets nothing."""
    if file is None:
        return [("", {})]
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--variants {file}: cannot be read: {error}") from None
    if not isinstance(found, dict) or not found or not all(isinstance(keys, dict) for keys in found.values()):
        raise UserError(
            f"--variants {file}: it must give names, each with keys and values, as in "
            "`no tag: {tags.QED.absent: true}` (or {} for the config as it is)."
        )
    for name, keys in found.items():
        _refuse_own(f"--variants {file}: {name}", keys)
    return [(str(name), _as_json(keys)) for name, keys in found.items()]


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _name(shown: dict[str, Any], seed: int) -> str:
    whole = "_".join(f"{key}={written(value)}" for key, value in shown.items())
    name = re.sub(r"[^\w=.-]+", "-", whole)
    if len(name.encode()) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 4]}-{digest_of(whole)[:8]}"
    return f"{name}_seed={seed}" if name else f"seed={seed}"
