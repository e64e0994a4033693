"""Puts a stage together: backbone, tags, examples, model. Train, eval and compose all start here."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagllm.config import SPLITS, BackboneConfig, DataConfig, RunConfig, Split, digest_of
from tagllm.data.collate import Collator
from tagllm.data.dataset import Data, Prompts, tokenise, tokenizer_digest
from tagllm.data.encode import Example
from tagllm.data.examples import Examples
from tagllm.data.layout import TagLayout
from tagllm.data.overlap import refuse_seen, with_files
from tagllm.data.sampler import Draw, all_draws
from tagllm.errors import SharedError
from tagllm.files import cache_folder
from tagllm.head import Head
from tagllm.model.backbone import Backbone, download, fastest_dtype, load_backbone
from tagllm.model.loading import Place
from tagllm.model.prefix import PrefixMemory
from tagllm.model.tagged import TaggedModel
from tagllm.ranks import Ranks
from tagllm.stage import Stage
from tagllm.tags import Tag
from tagllm.targets import check_targets, mean_and_spread, targets_of
from tagllm.template import Template


class Built(NamedTuple):
    stage: Stage
    backbone: Backbone
    layout: TagLayout
    tags: dict[str, Tag]
    data: Data
    model: TaggedModel

    @property
    def config(self) -> RunConfig:
        return self.stage.config

    def examples(self, split: Split) -> list[Examples]:
        return self.data.splits[split]

    def held_out(self, at: int) -> dict[str, Any]:
        """What tags keep of how rows of a source are held out."""
        return with_files(self.data.record[str(at)]["held_out"], self.config.data.sources[at])

    def draws(self, split: Split, limit: int | None = None, tag: str | None = None) -> list[Draw]:
        """`all_draws` of the split, or of those sources whose prompt has this tag."""
        asked = [tag is None or tag in template.tags for template in self.stage.templates]
        return all_draws([rows if mine else [] for rows, mine in zip(self.examples(split), asked, strict=True)], limit)

    def rows_with(self, split: Split, tag: str) -> NDArray[np.bool_]:
        """Which rows of a pass over the split stand in a prompt with this tag."""
        there = [tag in template.tags for template in self.stage.templates]
        return np.array([there[draw.source] for draw in self.draws(split)], bool)

    def collator(self) -> Collator:
        return self.stage.collator(self.layout, self.model.rotation is not None)

    def prompt_of(self, example: Example) -> str:
        """The beginning of a row without its tags, and its target, for people to find it by."""
        text = self.backbone.tokenizer.decode(example.ids[example.ids < self.layout.vocabulary_size])
        target = f" -> {', '.join(f'{value:g}' for value in example.target)}" if len(example.target) else ""
        return f"{text[:80]!r}{target}"

    def identity(self) -> dict[str, str]:
        """What a checkpoint of this run must agree on to be gone on from."""
        return {
            "backbone": self.backbone.identity.fingerprint,
            "tokenizer": tokenizer_digest(self.backbone.tokenizer),
            "data": self.data.digest,
            "dtype": self.backbone.dtype,
            "config": self.config.digest(),
            "loaded tags": loaded_digest(self.stage),
        }


def loaded_digest(stage: Stage) -> str:
    """Of all tags that a stage begins with."""
    return digest_of({name: _digest_of(tag) for name, tag in stage.loaded.items()})


def _digest_of(tag: Tag) -> str:
    """Of its rows, and of its head if it has one."""
    rows = _sha256(tag.rows_PD)
    if tag.head is None:
        return rows
    tensors = {name: _sha256(tensor) for name, tensor in tag.head.tensors().items()}
    return digest_of([rows, tag.head.spec.model_dump(mode="json", exclude_defaults=True), tensors])


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def build(stage: Stage, ranks: Ranks, place: Place | None = None) -> Built:
    """`build_on` the stage's own backbone, sharded by `place`.

    Raises:
        UserError: on all ranks alike.
    """
    backbone = open_backbone(stage.config.backbone, ranks, place)
    for path, library in stage.libraries.items():
        ranks.on_rank_zero(partial(library.backbone.require_same, backbone.identity, path))
    built = build_on(backbone, stage, ranks)
    require_same_everywhere(ranks.gather(built.identity()))
    return built


def require_same_everywhere(identities: Sequence[dict[str, str]]) -> None:
    """Raises SharedError where ranks read other files: another copy of the data on one machine, say."""
    first, problems = identities[0], []
    for item in first:
        if other := [rank for rank, identity in enumerate(identities) if identity[item] != first[item]]:
            problems.append(
                f"{item}: rank {', '.join(map(str, other))} has {identities[other[0]][item]:.12} and rank 0 "
                f"{first[item]:.12}; every rank reads its own files, which must be the same. Put them in a folder that "
                "all machines see."
            )
    if problems:
        raise SharedError(*problems)


def refuse_trained_on(stage: Stage, data: Data, tags: Mapping[str, Tag], splits: Collection[Split]) -> None:
    """Raises UserError where rows of these splits may be some that one of these tags was trained on."""
    sources = stage.config.data.sources
    mine = [with_files(data.record[str(at)]["held_out"], source) for at, source in enumerate(sources)]
    for name, tag in tags.items():
        asked = [at for at, template in enumerate(stage.templates) if name in template.tags]
        held_out = tag.about.get("held_out", [])
        if all(mine[at] in held_out for at in asked):  # as it was trained
            continue
        for at, split in itertools.product(asked, splits):
            refuse_seen(name, held_out, mine[at], split, f"data.sources.{at}")


def build_on(backbone: Backbone, stage: Stage, ranks: Ranks, splits: Sequence[Split] = SPLITS) -> Built:
    """Tokenises these splits (rank 0 first) and makes the tags and the model.

    Raises:
        UserError: on all ranks alike.
    """
    config, layout = stage.config, stage.layout(backbone.vocabulary_size)
    prompts = Prompts.of(layout, backbone.tokenizer, config.data.max_tokens, backbone.max_tokens)
    data = tokenise_on_all(config.data, stage.templates, prompts, ranks, splits)
    data = data._replace(doubts=(*data.doubts, *ranks.on_rank_zero(lambda: check_targets(stage, data))))
    tags = stage.loaded | {
        name: new_tag(stage, name, backbone, data) for name in config.tags if name not in stage.loaded
    }
    reads_tokens = bool(stage.weights.span or stage.weights.output)
    model = TaggedModel(backbone.model, tags, layout, empty_memory(config), reads_tokens, backbone.attention)
    return Built(stage, backbone, layout, tags, data, model.to(ranks.device))


def empty_memory(config: RunConfig, keeps: bool = True) -> PrefixMemory | None:
    """None where ranks must run the same passes."""
    return PrefixMemory(*(config.remembered_bytes if keeps else (0, 0))) if config.remembers else None


def tokenise_on_all(
    config: DataConfig, templates: list[Template], prompts: Prompts, ranks: Ranks, splits: Sequence[Split] = SPLITS
) -> Data:
    """Rank 0 reads and tokenises; the others then map what it cached."""

    def first() -> None:
        tokenise(config, templates, prompts, cache_folder(), splits)

    ranks.on_rank_zero(first, long=True)
    return tokenise(config, templates, prompts, cache_folder(), splits)


def open_backbone(config: BackboneConfig, ranks: Ranks, place: Place | None = None) -> Backbone:
    """Rank 0 downloads or converts before the others read, and its measured dtype is everybody's."""

    def first() -> BackboneConfig:
        download(config.model)
        dtype = fastest_dtype(ranks.device) if config.dtype == "auto" else config.dtype
        return config.model_copy(update={"dtype": dtype})

    return load_backbone(ranks.on_rank_zero(first, long=True), ranks.device, place)


def new_tag(stage: Stage, name: str, backbone: Backbone, data: Data) -> Tag:
    """A tag as it stands before training: initial rows, an empty head that knows the mean and spread of its targets."""
    config = stage.config.tags[name]
    embedding_VD = backbone.embedding().cpu()
    text = config.init.removeprefix("text:") if config.init.startswith("text:") else ""
    text_ids = backbone.tokenizer(text, add_special_tokens=False).input_ids if text else []
    if config.init.startswith("text:") and not text_ids:
        raise SharedError(f"tags.{name}.init is {config.init!r}; the text after `text:` gives no token. Write a word.")
    seed = int(np.random.SeedSequence([stage.config.seed, *name.encode()]).generate_state(1)[0])
    length = len(stage.loaded[name].rows_PD) if name in stage.loaded else config.length
    rows = initial_rows(config.init, length, embedding_VD, text_ids, seed) * backbone.token_scale
    head = Head.new(config.head, embedding_VD.shape[1], stage.pools) if config.head else None
    if head is not None and not head.spec.classes:
        mean_K, std_K = mean_and_spread(targets_of(stage, name, data), f"tags.{name}.head")
        head = replace(head, mean_K=torch.from_numpy(mean_K), std_K=torch.from_numpy(std_K))
    return Tag(name, config.kind, rows[:0] if config.absent else rows, head)


def initial_rows(init: str, length: int, embedding_VD: Tensor, text_ids: list[int], seed: int) -> Tensor:
    """First values of a new tag, fp32 (length, D).

    `mean`: the direction of the mean token embedding at the mean token norm, plus a little noise so that rows differ
    (the authors' fixed ratio belongs to LLaMA-7B; here both are measured). `vocabulary`: random tokens. `normal`:
    Gaussian with the spread of the embedding. `text:…`: the tokens of a text, repeated to the length.
    """
    random = torch.Generator().manual_seed(seed)
    vocabulary = len(embedding_VD)
    if init == "vocabulary":
        return embedding_VD[torch.randint(vocabulary, (length,), generator=random)].float()
    if init.startswith("text:"):
        return embedding_VD[torch.tensor([text_ids[i % len(text_ids)] for i in range(length)])].float()
    sample_ND = embedding_VD[torch.randperm(vocabulary, generator=random)[:20_000]].float()
    noise_PD: Tensor = torch.randn(length, sample_ND.shape[1], generator=random) * sample_ND.std(dim=0)
    if init == "normal":
        return noise_PD
    mean_D: Tensor = sample_ND.mean(dim=0)
    rows_PD: Tensor = mean_D / mean_D.norm() * sample_ND.norm(dim=1).mean() + 0.1 * noise_PD
    return rows_PD
