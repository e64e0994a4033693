"""`tagllm plan`: the tables. Tokenises the data as training would, since row lengths decide; loads no weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from tagllm.config import RunConfig, load_config
from tagllm.data.dataset import Prompts, prepare
from tagllm.errors import UserError
from tagllm.model.backbone import DTYPES, load_tokenizer, resolve
from tagllm.model.loading import skeleton
from tagllm.model.smollm2 import cache_folder
from tagllm.plan import Estimate, Hardware, Load, Placement, Shape, choose, estimate
from tagllm.stage import Stage, check_world, read_stage
from tagllm.train.rows import StepRows

PLACEMENTS: tuple[Placement, ...] = ("replicate", "shard in a node", "shard")
STEPS = 4
"""Looked at; the largest micro-batch among them decides about memory."""


def plan_config(path: Path, overrides: list[str], hardware: Hardware) -> Iterator[Table | str]:
    """What `tagllm plan` prints.

    Raises:
        UserError: as `train` would before the first step.
    """
    config = load_config(path, overrides)
    stage = read_stage(config, str(path))
    check_world(config, hardware.gpus, str(path))
    dtype = DTYPES["bf16" if config.backbone.dtype == "auto" else config.backbone.dtype]
    try:
        model = skeleton(resolve(config.backbone.model), dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.model is {config.backbone.model!r}; its config cannot be read: {error}") from None
    shape = Shape.of(model, config.backbone.quantize)
    loads = _loads(config, stage, shape.embedding // shape.hidden, hardware.gpus)
    learned = shape.hidden * sum(t.length for n, t in config.tags.items() if n in stage.learned)
    estimates = [estimate(shape, loads, learned, config, hardware, p) for p in PLACEMENTS]
    if hardware.nodes == 1:
        del estimates[1]
    chosen, why = choose(estimates, hardware)
    yield f"{config.backbone.model}: {shape.parameters:,} parameters, {shape.map_weights:,} of them in linear maps"
    yield f"placement {why}"
    yield _memory(estimates)
    yield _time(estimates, hardware)
    yield _scaling(shape, loads, learned, config, hardware, (chosen or estimates[-1]).placement)


def _loads(config: RunConfig, stage: Stage, vocabulary_size: int, num_ranks: int) -> list[Load]:
    """Of the micro-batches of rank 0 in an average step: those of the first steps, as many as one step has."""
    tokenizer = load_tokenizer(config.backbone.model)
    layout = stage.layout(vocabulary_size)
    prompts = Prompts(layout, tokenizer, config.data.max_tokens or 1 << 20)
    data = prepare(config.data, stage.templates, prompts, cache_folder(), ("train",))
    rows, collate = StepRows(config, data.splits["train"], 0, num_ranks), stage.collator(layout, free_spans=False)
    found = [Load.of(collate(chunk)) for step in range(STEPS) for chunk in rows.micro_batches(step)]
    return sorted(found, reverse=True)[::STEPS]


def _memory(estimates: list[Estimate]) -> Table:
    table = Table(title="memory of a rank, MiB")
    for title in ("", *(e.placement for e in estimates)):
        table.add_column(title, justify="right" if title else "left")
    for kind in estimates[0].memory:
        table.add_row(kind, *(f"{e.memory[kind] / 2**20:,.0f}" for e in estimates))
    table.add_section()
    table.add_row("in all", *(f"{e.total / 2**20:,.0f}" for e in estimates))
    return table


def _time(estimates: list[Estimate], hardware: Hardware) -> Table:
    table = Table(
        title=f"a step at {hardware.tflops:g} TFLOP/s, {hardware.node_gbs:g} GB/s in a node, "
        f"{hardware.network_gbs:g} between nodes"
    )
    for title in ("placement", "TFLOP", "computing, s", "sent by a rank, MB", "sending, s"):
        table.add_column(title, justify="left" if title == "placement" else "right")
    for e in estimates:
        computing, sending = e.seconds(hardware)
        table.add_row(
            e.placement, f"{e.flops / 1e12:.2f}", f"{computing:.3f}", f"{e.sent / 1e6:,.2f}", f"{sending:.4f}"
        )
    return table


def _scaling(
    shape: Shape, loads: list[Load], learned: int, config: RunConfig, hardware: Hardware, placement: Placement
) -> Table:
    """The same micro-batches on every rank, so steps grow with the ranks."""
    rows = config.optim.rows_per_step / hardware.gpus
    table = Table(title=f"{placement}, {rows:g} rows per rank and step")
    for title in ("GPUs", "rows/s", "of linear"):
        table.add_column(title, justify="right")
    alone = 0.0
    for gpus in (2**k for k in range(11)):
        there = hardware._replace(gpus=gpus)
        seconds = sum(estimate(shape, loads, learned, config, there, placement).seconds(there))
        alone = alone or rows / seconds
        table.add_row(f"{gpus:,}", f"{gpus * rows / seconds:,.1f}", f"{rows / seconds / alone:.0%}")
    return table
