"""What a finished run was asked to learn, without its tags: its rows, its backbone as it is, a blank head."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from tagllm.baselines.methods import Method
from tagllm.baselines.plain import load_plain
from tagllm.baselines.prompts import Row, Untagged
from tagllm.config import SPLITS, RunConfig, Split
from tagllm.data.dataset import Data, Prompts
from tagllm.data.encode import TagLayout
from tagllm.errors import UserError
from tagllm.evaluate.held_out import require_same_rows
from tagllm.evaluate.passes import all_draws
from tagllm.head import Head
from tagllm.model.backbone import Backbone
from tagllm.stage import Stage, stage_of_run
from tagllm.tags import TagLibrary
from tagllm.train.build import prepare_on_all
from tagllm.train.ranks import Ranks
from tagllm.train.run_folder import RunFolder, read_config, training_seconds


class Task(NamedTuple):
    """`head`: zeros, with the mean and spread of the training targets. `virtual`: rows that the run's function tags
    learn. `seconds`: what its training took."""

    run: Path
    config: RunConfig
    backbone: Backbone
    layout: TagLayout
    data: Data
    head: Head
    virtual: int
    seconds: float
    device: torch.device

    def untagged(self, method: Method) -> Untagged:
        return Untagged.of(self.layout, self.backbone.tokenizer, method.names_domains)

    def rows(self, split: Split, method: Method, limit: int | None = None) -> list[Row]:
        """In the order of the data; `limit` rows drawn evenly from all of it, as the run's own fits do."""
        untagged = self.untagged(method)
        sources = self.data.splits[split]
        return [untagged(sources[draw.source][draw.row]) for draw in all_draws(sources, limit)]


def open_task(run: Path) -> Task:
    """
    Raises:
        UserError: no finished run, one whose rows are not all answered by one learned head, or other rows than the run
            recorded.
    """
    config, folder = read_config(run), RunFolder(run)
    library = TagLibrary.load(folder.library)
    stage = stage_of_run(config, library, str(folder.library))
    name = _head_of(stage, run)
    ranks = Ranks.start(config.engine.timeout_s)
    backbone = load_plain(config.backbone, ranks.device)
    library.backbone.require_same(backbone.identity, str(folder.library))
    layout = stage.layout(backbone.vocabulary_size)
    limit = config.data.max_tokens or backbone.max_tokens
    data = prepare_on_all(config.data, stage.templates, Prompts(layout, backbone.tokenizer, limit), ranks)
    require_same_rows(folder, data, SPLITS)
    for split in SPLITS:
        if not any(map(len, data.splits[split])):
            raise UserError(
                f"{run}: its {split} split has no rows; learning rates are chosen on valid and results are of test. "
                "Train a run whose data.sources have all three splits."
            )
    learned = library.tags[name].head
    assert learned is not None
    virtual = sum(layout.lengths[tag] for tag in layout.learned if layout.kinds[tag] == "function")
    return Task(run, config, backbone, layout, data, learned.blank(), virtual, training_seconds(run), ranks.device)


def _head_of(stage: Stage, run: Path) -> str:
    """The one tag whose head answers every row."""
    heads = stage.layout(0).heads
    learned = [name for name in stage.learned if name in heads]
    rule = "the trained baselines learn one head on the same rows"
    if not learned:
        raise UserError(
            f"{run}: none of its learned tags ({', '.join(stage.learned)}) has a head; {rule}. Choose a run of a "
            "function tag with one."
        )
    if len(heads) > 1:
        raise UserError(f"{run}: {', '.join(heads)} have a head each; {rule}. Choose a run with one of them.")
    if without := [at for at, template in enumerate(stage.templates) if learned[0] not in template.tags]:
        raise UserError(
            f"{run}: the template of data.sources.{without[0]} has no <{learned[0]}>, so its rows have no target; "
            f"{rule}. Choose a run whose sources all have it."
        )
    return learned[0]
