"""`tagllm check`: everything that can be found wrong before a weight is loaded, all at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tagllm.config import SPLITS, SourceConfig, Split
from tagllm.config_file import load_config
from tagllm.contradictions import check_world
from tagllm.data.dataset import check_columns, tokenise
from tagllm.data.overlap import check_keys
from tagllm.data.readers import column_names
from tagllm.data.recipes import recipe_of
from tagllm.errors import UserError
from tagllm.evaluate.text import problems_of
from tagllm.files import cache_folder
from tagllm.stage import Stage, read_stage
from tagllm.template import parse_template
from tagllm.train.deepspeed_settings import read_deepspeed
from tagllm.unusual import unusual


def check_config(path: Path, overrides: list[str], num_ranks: int, rows: bool = False) -> list[str]:
    """Lines that say what the config will do. With `rows` these are read and tokenised, too; `train` finds them done.

    Raises:
        UserError: every problem found in the config, its libraries, templates, data files and division of rows; then
            those in the rows.
    """
    config = load_config(path, overrides)
    where, stage, problems = str(path), None, list[str]()
    with _gathered(problems):
        stage = read_stage(config, where)
    with _gathered(problems):
        check_world(config, num_ranks, where)
    problems += [f"{where}: {problem}" for problem in problems_of(config.evaluation, "evaluation")]
    problems += [f"{where}: {problem}" for problem in _of_backbone(config.backbone.model)]
    if config.engine.deepspeed is not None:
        with _gathered(problems, where):
            read_deepspeed(config.engine.deepspeed)
    kinds = dict.fromkeys(config.tags, "domain")  # which does not matter to the columns
    for at, source in enumerate(config.data.sources):
        place = f"{where}: data.sources.{at}"
        with _gathered(problems, place, where):
            template = stage.templates[at] if stage else parse_template(source.template, kinds, f"{place}.template")
            for name, columns in _columns(source).items():
                check_columns(source, template, columns, f"{place} ({name})")
    if stage is not None:
        with _gathered(problems, where):
            check_keys(config.data.sources, stage.templates, [_given(source) for source in config.data.sources])
    if problems or stage is None:
        raise UserError(*dict.fromkeys(problems))
    tags = ", ".join(f"<{name}>{'' if name in stage.learned else ' (frozen)'}" for name in config.tags)
    terms = ", ".join(f"{name} x {weight:g}" for name, weight in stage.weights._asdict().items() if weight)
    length = f"{config.optim.steps} steps" if config.optim.steps else f"{config.optim.epochs:g} epochs"
    lines = [f"{path}: good", f"  tags: {tags}", f"  loss: {terms}", f"  {length} of {config.optim.rows_per_step} rows"]
    lines += [f"  note: {note}" for note in unusual(stage)]
    return lines + ([f"  {line}" for line in _of_rows(stage)] if rows else [])


def _of_backbone(name: str) -> list[str]:
    """A folder that is not there or holds no model; of a name on a hub, and of the package, only loading tells."""
    folder = Path(name)
    if name == "smollm2":
        return []
    if folder.is_dir():
        there = (folder / "config.json").is_file()
        return [] if there else [f"backbone.model is {name!r}, a folder without config.json. Name one of a model."]
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return [
            f"backbone.model is {name!r}, and there is no such folder. Check the spelling (seen from {Path.cwd()})."
        ]
    return []


def _of_rows(stage: Stage) -> list[str]:
    """How many examples there are of each source, and how long they are."""
    from tagllm.build import refuse_trained_on  # with these come torch and transformers, which take seconds
    from tagllm.targets import check_targets
    from tagllm.train.placement import shape_and_prompts

    _, prompts = shape_and_prompts(stage)
    data = tokenise(stage.config.data, stage.templates, prompts, cache_folder())
    refuse_trained_on(stage, data, stage.knowing, ["valid", "test"])
    lines = []
    for at, about in data.record.items():
        of_splits = {split: examples[int(at)] for split, examples in data.splits.items()}
        counts = ", ".join(f"{split} {len(examples):,}" for split, examples in of_splits.items())
        lengths_n = np.concatenate([examples.lengths() for examples in of_splits.values()])
        lines.append(
            f"data.sources.{at} ({about['name']}): {counts}; {lengths_n.mean():.0f} tokens on average, "
            f"{lengths_n.max():,} at most, of {prompts.max_tokens:,}"
        )
    return [*lines, *check_targets(stage, data), *data.told()]


def _given(source: SourceConfig) -> Collection[Split]:
    """The splits that its data has itself; of a hub and of a recipe, where only reading tells, it is taken for all."""
    return [split for split in source.paths if split] if source.paths else SPLITS


def _columns(source: SourceConfig) -> dict[str, list[str]]:
    """By recipe or file; of a hub only reading tells."""
    if source.recipe is not None:
        return {source.recipe: list(recipe_of(source.recipe).columns)}
    return {file: column_names(Path(file)) for file in source.paths.values()}


@contextmanager
def _gathered(problems: list[str], place: str = "", unless: str = "") -> Iterator[None]:
    """Puts mistakes with the others, behind their place, unless they begin with one already."""
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            told = bool(unless) and problem.startswith(unless)
            problems.append(problem if told or not place else f"{place}: {problem}")
