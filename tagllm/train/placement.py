"""Where a backbone is kept, whole on every rank or sharded: a run's by the planner's figures, else by its size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tagllm.config import BackboneConfig, EngineConfig, RunConfig
from tagllm.data.dataset import Prompts, tokenise
from tagllm.errors import UserError
from tagllm.files import cache_folder
from tagllm.model.backbone import DTYPES, fastest_dtype, load_tokenizer, longest_prompt, resolve
from tagllm.model.loading import skeleton
from tagllm.plan import Hardware, Load, Shape, choose, estimate, placements
from tagllm.ranks import Ranks, ranks_per_node
from tagllm.stage import Stage
from tagllm.train.rows import StepRows

STEPS = 4
"""Looked at; the largest micro-batch among them decides about memory."""


def placed(stage: Stage, ranks: Ranks) -> tuple[RunConfig, str]:
    """The config with `engine.zero_stage: auto` decided, and why; called on one rank for all.

    Where that is 3 nothing is remembered, whatever the config says: the budgets were given for the other case.
    """
    config, cuda = stage.config, ranks.device.type == "cuda"
    hardware = Hardware(ranks.size, ranks_per_node(ranks.size), _memory(ranks) / 2**30)  # speeds do not decide
    if config.backbone.dtype == "auto":
        stage = stage._replace(config=config.in_dtype(fastest_dtype(ranks.device)))
    shape, loads, learned = figures_of(stage, ranks.size)
    ways = placements(config, hardware)
    chosen, why = choose([estimate(shape, loads, learned, config, hardware, way, cuda) for way in ways], hardware)
    placement = chosen.placement if chosen is not None else ways[-1]
    if placement == "replicate":
        return config.model_copy(update={"engine": config.engine.model_copy(update={"zero_stage": 0})}), why
    if config.remember_gib or config.remember_device_gib:
        why += "; remember_gib and remember_device_gib are 0 then: sharded, ranks must all run the same passes"
    decided: dict[str, Any] = {"zero_stage": 3}
    if placement == "shard in a node":
        decided["shard_over"] = "node"
    changed = {"engine": config.engine.model_copy(update=decided), "remember_gib": 0.0, "remember_device_gib": 0.0}
    return config.model_copy(update=changed), why


def placed_to_answer(backbone: BackboneConfig, engine: EngineConfig, ranks: Ranks) -> EngineConfig:
    """`engine` of a backbone that is asked and not trained through, with `zero_stage: auto` decided: 0 where its
    weights take at most half of a rank's memory (the rest is for keys, logits and what is kept of rows), else 3, in
    each node by itself where a part of them does. Collective."""
    if ranks.size == 1:
        return engine.alone()
    if engine.zero_stage != "auto":
        return engine

    def halves() -> float:
        dtype = fastest_dtype(ranks.device) if backbone.dtype == "auto" else backbone.dtype
        shape = Shape.of(_skeleton(backbone.model_copy(update={"dtype": dtype})), backbone.quantize)
        return (shape.weight_bytes + shape.scale_bytes) / (_memory(ranks) / 2)

    needed, local = ranks.on_rank_zero(halves, long=True), ranks_per_node(ranks.size)
    if needed <= 1:
        return engine.alone()
    in_node = 1 < local < ranks.size and ranks.size % local == 0 and needed <= local
    return engine.model_copy(update={"zero_stage": 3} | ({"shard_over": "node"} if in_node else {}))


def _memory(ranks: Ranks) -> float:
    """Bytes that this rank may use where its backbone is."""
    if ranks.device.type == "cuda":
        return float(torch.cuda.get_device_properties(ranks.device).total_memory)
    return host_memory() / ranks_per_node(ranks.size)


def host_memory(groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may use: of the machine, or of its job (a control group, or one that this is part of)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in mine.read_text(encoding="utf-8").splitlines() if mine.is_file() else []:
        _, controllers, path = line.split(":", 2)
        root = groups / "memory" if "memory" in controllers.split(",") else groups
        for parent in (Path(path), *Path(path).parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                file = root / str(parent).lstrip("/") / name
                limit = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
                limits += [int(limit)] if limit.isdigit() else []
    return min(limits)


def figures_of(stage: Stage, num_ranks: int) -> tuple[Shape, list[Load], int]:
    """The backbone, the micro-batches of rank 0 in an average step, and how many numbers are learned.

    Raises:
        UserError: the backbone's config or the data cannot be read.
    """
    config, (shape, prompts) = stage.config, shape_and_prompts(stage)
    data = tokenise(config.data, stage.templates, prompts, cache_folder(), ("train",))
    rows = StepRows(config, data.splits["train"], 0, num_ranks)
    collate = stage.collator(prompts.layout, free_spans=False)
    found = [Load.of(collate(chunk)) for step in range(STEPS) for chunk in rows.micro_batches(step)]
    learned = shape.hidden * sum(prompts.layout.lengths[name] for name in stage.learned)
    return shape, sorted(found, reverse=True)[::STEPS], learned


def shape_and_prompts(stage: Stage) -> tuple[Shape, Prompts]:
    """What can be known of a stage's backbone without its weights.

    Raises:
        UserError: its config or its tokenizer cannot be read.
    """
    backbone = stage.config.backbone
    model = _skeleton(backbone)
    shape = Shape.of(model, backbone.quantize)
    layout, tokenizer = stage.layout(shape.vocabulary), load_tokenizer(backbone.model)
    return shape, Prompts.of(layout, tokenizer, stage.config.data.max_tokens, longest_prompt(model.config))


def _skeleton(backbone: BackboneConfig) -> Any:
    """A model without weights.

    Raises:
        UserError: the backbone's config cannot be read.
    """
    try:
        return skeleton(resolve(backbone.model), DTYPES["bf16" if backbone.dtype == "auto" else backbone.dtype])
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.model is {backbone.model!r}; its config cannot be read: {error}") from None
