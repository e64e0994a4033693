"""What a finished run was asked to learn, without its tags: its rows, its backbone as it is, a blank head."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from tagllm.baselines.methods import Method
from tagllm.baselines.plain import load_plain
from tagllm.baselines.prompts import Row, Untagged
from tagllm.build import tokenise_on_all
from tagllm.config import SPLITS, RunConfig, Split
from tagllm.data.dataset import Data, Prompts
from tagllm.data.layout import TagLayout
from tagllm.data.sampler import all_draws
from tagllm.errors import UserError
from tagllm.head import Head
from tagllm.model.backbone import Backbone
from tagllm.ranks import Ranks
from tagllm.run_folder import RunFolder, read_config
from tagllm.stage import Stage, stage_of_run
from tagllm.tags import TagLibrary


class Task(NamedTuple):
    """The rows of one head. `config`: its sources are those of these rows; `digest`: that of the run's own. `tag`: the
    one with the head, if there are several, else empty. `head`: zeros, with the mean and spread of the training
    targets. `virtual`: rows that the function tags of these rows learn. `seconds`: what the run's training took of
    all its GPUs together (there is one here), its share by the number of rows."""

    run: Path
    config: RunConfig
    digest: str
    tag: str
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


class Asked(NamedTuple):
    """What is known of a run before its backbone is loaded. `heads`: the sources that each of them answers, by tag."""

    config: RunConfig
    library: TagLibrary
    stage: Stage
    heads: dict[str, list[int]]

    @property
    def has_domain(self) -> bool:
        """One that stands in the prompts, too."""
        return any(tag.kind == "domain" and len(tag.rows_PD) for tag in self.stage.loaded.values())


def read_asked(run: Path) -> Asked:
    """
    Raises:
        UserError: no finished run, or one whose rows are not all answered by a learned head.
    """
    config, folder = read_config(run), RunFolder(run).library
    library = TagLibrary.load(folder)
    stage = stage_of_run(config, library, str(folder))
    return Asked(config, library, stage, _heads_of(stage, run))


def open_tasks(run: Path) -> list[Task]:
    """One for each head, over one backbone.

    Raises:
        UserError: as `read_asked`, or other rows than the run recorded.
    """
    folder, (config, library, stage, heads) = RunFolder(run), read_asked(run)
    ranks = Ranks.start(config.engine.timeout_s)
    backbone = load_plain(config.backbone, ranks.device)
    library.backbone.require_same(backbone.identity, str(folder.library))
    layout = stage.layout(backbone.vocabulary_size)
    prompts = Prompts.of(layout, backbone.tokenizer, config.data.max_tokens, backbone.max_tokens)
    data = tokenise_on_all(config.data, stage.templates, prompts, ranks)
    folder.require_same_rows(data, SPLITS)
    trained, num_rows = folder.training(), sum(map(len, data.splits["train"]))
    num_gpus = trained["ranks"] if ranks.device.type == "cuda" else 1  # CPU ranks shared what one now has
    seconds = trained["seconds"] * num_gpus
    tasks = []
    for tag, sources in heads.items():
        mine = data._replace(splits={split: [every[at] for at in sources] for split, every in data.splits.items()})
        for split in SPLITS:
            if not any(map(len, mine.splits[split])):
                raise UserError(
                    f"{run}: its {split} split has no rows for <{tag}>; learning rates are chosen on valid and results "
                    "are of test. Train a run whose data.sources have all three splits."
                )
        learned = library.tags[tag].head
        assert learned is not None
        behind = {name for at in sources for name in stage.templates[at].tags if name in layout.learned}
        virtual = sum(layout.lengths[name] for name in behind if layout.kinds[name] == "function")
        share = sum(map(len, mine.splits["train"])) / num_rows
        own = config.data.model_copy(update={"sources": [config.data.sources[at] for at in sources]})
        tasks.append(
            Task(
                run, config.model_copy(update={"data": own}), config.digest(), tag if len(heads) > 1 else "", backbone,
                layout, mine, learned.blank(), virtual, seconds * share, ranks.device,
            )
        )  # fmt: skip
    return tasks


def _heads_of(stage: Stage, run: Path) -> dict[str, list[int]]:
    heads = stage.heads
    found: dict[str, list[int]] = {name: [] for name in stage.learned if name in heads}
    if not found:
        raise UserError(
            f"{run}: none of its learned tags ({', '.join(stage.learned)}) has a head; the trained baselines learn a "
            "head on the same rows. Choose a run of a function tag with one."
        )
    for at, template in enumerate(stage.templates):
        mine = [name for name in template.tags if name in found]
        if not mine:
            raise UserError(
                f"{run}: the template of data.sources.{at} has no {' or '.join(f'<{name}>' for name in found)}, so its "
                "rows have no target; the trained baselines learn a head on the same rows. Choose a run whose sources "
                "all have one."
            )
        found[mine[0]].append(at)
    return {name: sources for name, sources in found.items() if sources}
