"""`tagllm plan`: the tables. Tokenises the data as training would, since row lengths decide; loads no weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from tagllm.config import RunConfig
from tagllm.config_file import load_config
from tagllm.contradictions import check_world
from tagllm.plan import Estimate, Hardware, Load, Placement, Shape, choose, estimate, placements
from tagllm.stage import read_stage
from tagllm.train.placement import figures_of


def plan_config(path: Path, overrides: list[str], hardware: Hardware) -> Iterator[Table | str]:
    """What `tagllm plan` prints.

    Raises:
        UserError: as `train` would before the first step.
    """
    config = load_config(path, overrides)
    stage = read_stage(config, str(path))
    check_world(config, hardware.gpus, str(path))
    shape, loads, learned = figures_of(stage, hardware.gpus)
    estimates = [estimate(shape, loads, learned, config, hardware, way) for way in placements(config, hardware)]
    chosen, why = choose(estimates, hardware)
    yield f"{config.backbone.model}: {shape.parameters:,} parameters, {shape.map_weights:,} of them in linear maps"
    yield f"placement {why}"
    yield _memory(estimates)
    yield _time(estimates, hardware)
    yield _scaling(shape, loads, learned, config, hardware, (chosen or estimates[-1]).placement)


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
