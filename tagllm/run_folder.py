"""What stands in a run folder, and that it holds one run only.

config.yaml  origin.json  splits.json  bad_rows.jsonl  metrics.jsonl  tensorboard/  checkpoints/  library/  last/
probe-train.safetensors  probe-valid.safetensors  results.json  held_out.safetensors  held_out.csv  generated.jsonl
baselines/  .lock  valid/, train/ and SPLIT-DIGEST/ (the same four of other rows, where eval was asked for them)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tagllm.config import BackboneConfig, Dtype, EngineConfig, RunConfig, Section, Split, flat
from tagllm.config_file import from_overrides, load_config
from tagllm.data.dataset import Data
from tagllm.errors import UserError
from tagllm.files import DamagedFile, json_bytes, read_json, read_json_lines, write_whole
from tagllm.origin import origin
from tagllm.tags import TagLibrary


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.library = path / "library"
        """The result: the best state on validation, refitted where that is better."""
        self.last = path / "last"
        """The state of the last step."""

    def scores(self, split: Split, other: str = "") -> Path:
        """The folder of what `tagllm eval` finds on these rows; `other` is the digest of a config with other data than
        the run's."""
        return self.path / f"{split}-{other[:8]}" if other else self.path if split == "test" else self.path / split

    def scored(self) -> Path:
        """The folder of results: those on the rows to test, or else on others."""
        if (self.path / "config.yaml").is_file():  # or what lies in valid/ and train/ is of something else
            for split in ("test", "valid", "train"):
                file = self.scores(split) / "results.json"
                if file.is_file() and read_json(file)["split"] == split:
                    return self.scores(split)
        return self.path

    def probe(self, split: Split) -> Path:
        """What ridge probes see of the rows to fit and to choose on: eval would need their prefixes again."""
        return self.path / f"probe-{split}.safetensors"

    def claim(self, config: RunConfig, fastest_dtype: Callable[[], Dtype]) -> RunConfig:
        """Checks that the folder is empty or holds this very run, and changes nothing.

        Returns:
            The config with the dtype that the run began in, where it is `auto`: measured anew it may be another one.

        Raises:
            UserError: the folder holds something else.
        """
        held = read_config(self.path) if (self.path / "config.yaml").is_file() else None
        if held is None and self.path.is_dir() and any(map(_is_foreign, self.path.iterdir())):
            raise UserError(f"output: {self.path} is not empty and holds no run. Give another output=FOLDER.")
        if config.backbone.dtype == "auto":
            config = config.in_dtype(held.backbone.dtype if held else fastest_dtype())
        if held and held.digest() != config.digest():
            raise UserError(
                f"output: {self.path} already holds another run (its config digest is {held.digest()[:12]}, this "
                f"one's is {config.digest()[:12]}; they differ in {', '.join(differences(held, config))}). "
                "Give another output=FOLDER, or remove that one."
            )
        return config

    def record(self, config: RunConfig, data: Data, num_ranks: int, loaded_tags: str) -> None:
        """The resolved config, where it comes from (of `loaded_tags` the digest), the splits and the rows that could
        not be used."""
        write_whole(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
        write_whole(self.path / "origin.json", json_bytes({**origin(), "ranks": num_ranks, "loaded_tags": loaded_tags}))
        write_whole(self.path / "splits.json", json_bytes(data.record))
        rows = "".join(json.dumps(row._asdict()) + "\n" for row in data.bad_rows)
        write_whole(self.path / "bad_rows.jsonl", rows.encode())

    def require_same_rows(self, data: Data, splits: Sequence[Split]) -> None:
        """Raises UserError where these splits are not those that training recorded."""
        recorded = read_json(self.path / "splits.json")
        for source, now in data.record.items():
            for name in splits:
                then, here = recorded[source]["splits"][name], now["splits"][name]
                if then != here:
                    raise UserError(
                        f"{self.path}/splits.json: the {name} rows of source {source} were {then}, now they are "
                        f"{here}; the data changed since training. Restore it, or train anew."
                    )

    @property
    def is_finished(self) -> bool:
        return (self.library / "library.json").is_file()

    def began_with(self) -> dict[str, Any]:
        """What the splits of each source were and, as a digest, the tags that were loaded."""
        splits = read_json(self.path / "splits.json")
        data = {source: about["splits"] for source, about in splits.items()}
        return {"data": data, "loaded tags": read_json(self.path / "origin.json")["loaded_tags"]}

    def training(self) -> dict[str, Any]:
        """Where the tags come from: `origin` and ranks of the last process that trained them, the seconds of all."""
        return {**read_json(self.path / "origin.json"), "seconds": training_seconds(self.path)}


def _is_foreign(path: Path) -> bool:
    """Not what a start leaves that was cut off before it wrote its config."""
    return path.name != ".lock" and not path.name.startswith(".tmp-")


def read_config(run: Path, overrides: Sequence[str] | None = None) -> RunConfig:
    """The resolved config of a run, with `key=value` overrides.

    Raises:
        UserError: the folder holds no run, its config is of another version, or an override cannot be applied.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: holds no run (no config.yaml). Train one with: tagllm train CONFIG")
    return load_config(file, overrides, resolve=False)


def settings_to_answer(source: Path, overrides: list[str]) -> tuple[BackboneConfig | None, EngineConfig]:
    """The backbone of a run (None for a bare library: it knows its own) and how ranks keep it, `backbone.KEY=VALUE` and
    `engine.KEY=VALUE` overrides applied."""
    wrong = [each for each in overrides if not each.startswith(("backbone.", "engine.")) or "=" not in each]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: predict takes only backbone.KEY=VALUE and engine.KEY=VALUE.")
    known: dict[str, Any] | None = None
    if (source / "config.yaml").is_file():
        known = read_config(source).backbone.model_dump(mode="json")
    elif any(each.startswith("backbone.") for each in overrides):
        known = {"model": TagLibrary.load(source).backbone.name}
    found = from_overrides(_ToAnswer, overrides, {} if known is None else {"backbone": known})
    return found.backbone, found.engine


class _ToAnswer(Section):
    backbone: BackboneConfig | None = None
    engine: EngineConfig = EngineConfig()


def training_seconds(run: Path) -> float:
    """Of all processes that trained the run."""
    return float(_logged(run)[-1]["seconds"])


def best_valid_loss(run: Path) -> float:
    """The lowest loss on validation that training logged, heads refitted; infinity where none was a finite number.

    Raises:
        UserError: there are no rows for validation.
    """
    if not any(source["splits"]["valid"]["n"] for source in read_json(run / "splits.json").values()):
        raise UserError(f"{run}: has no rows for validation, by which values are chosen. Give its sources some.")
    found = [line["valid/loss_refitted"] for line in _logged(run) if "valid/loss_refitted" in line]
    return float(min(found, default=math.inf))  # the log has finite numbers alone


def _logged(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    if not (lines := read_json_lines(file)):
        raise DamagedFile(file, "it is empty")
    return lines


def differences(one: Section, other: Section) -> list[str]:
    """Keys that are not alike."""
    a, b = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key) and key != "output"]
