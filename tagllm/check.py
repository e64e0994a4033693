"""`tagllm check`: everything that can be found wrong before a weight is loaded, all at once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tagllm.config import SPLITS, SourceConfig, Split
from tagllm.config_file import load_config
from tagllm.data.dataset import check_columns
from tagllm.data.readers import column_names
from tagllm.data.recipes import recipe_of
from tagllm.data.splits import check_keys
from tagllm.errors import UserError
from tagllm.evaluate.text import problems_of
from tagllm.stage import check_world, read_stage
from tagllm.train.deepspeed_settings import read_deepspeed
from tagllm.unusual import unusual


def check_config(path: Path, overrides: list[str], num_ranks: int) -> list[str]:
    """Lines that say what the config will do.

    Raises:
        UserError: every problem found in the config, its libraries, templates, data files and division of rows.
    """
    config = load_config(path, overrides)
    where, problems = str(path), list[str]()
    try:
        stage = read_stage(config, where)
    except UserError as error:
        stage, problems = None, list(error.problems)
    try:
        check_world(config, num_ranks, where)
    except UserError as error:
        problems += error.problems
    problems += [f"{where}: {problem}" for problem in problems_of(config.evaluation, "evaluation")]
    if config.engine.deepspeed is not None:
        try:
            read_deepspeed(config.engine.deepspeed)
        except UserError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    for at, source in enumerate(config.data.sources):
        place = f"{where}: data.sources.{at}"
        try:
            if source.recipe is not None:
                found = {source.recipe: list(recipe_of(source.recipe).columns)}
            else:
                paths = [source.path] if isinstance(source.path, str) else list((source.path or {}).values())
                found = {file: column_names(Path(file)) for file in paths}
            if stage is not None:
                for name, columns in found.items():
                    check_columns(source, stage.templates[at], columns, f"{place} ({name})")
        except UserError as error:
            problems += [problem if problem.startswith(where) else f"{place}: {problem}" for problem in error.problems]
    if stage is not None:
        try:
            check_keys(config.data.sources, stage.templates, [_given(source) for source in config.data.sources])
        except UserError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    if problems or stage is None:
        raise UserError(*problems)
    tags = ", ".join(f"<{name}>{'' if name in stage.learned else ' (frozen)'}" for name in config.tags)
    terms = ", ".join(f"{name} x {weight:g}" for name, weight in stage.weights._asdict().items() if weight)
    length = f"{config.optim.steps} steps" if config.optim.steps else f"{config.optim.epochs:g} epochs"
    lines = [f"{path}: good", f"  tags: {tags}", f"  loss: {terms}", f"  {length} of {config.optim.rows_per_step} rows"]
    return lines + [f"  note: {note}" for note in unusual(stage)]


def _given(source: SourceConfig) -> Collection[Split]:
    """The splits that its data has itself; of a hub and of a recipe, where only reading tells, it is taken for all."""
    if source.path is None:
        return SPLITS
    return () if isinstance(source.path, str) else source.path
