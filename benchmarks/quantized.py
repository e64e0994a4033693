"""What 8 and 4 bits cost: `python -m benchmarks.quantized --json FILE`.

Loss and tag gradient on real prompts against the bf16 backbone, and the held-out loss after the same training.
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.vs_peers import quiet
from tagllm.build import build
from tagllm.config import RunConfig
from tagllm.config_file import parse_as
from tagllm.data.batch import count
from tagllm.model.loss import total
from tagllm.origin import commit, hardware
from tagllm.ranks import Ranks
from tagllm.stage import read_stage
from tagllm.train.loop import train
from tagllm.train.signals import StopRequest

KINDS = ("none", "int8", "llm_int8", "nf4")
PROMPTS = 32


class Figures(NamedTuple):
    """`weights_mib` of the whole backbone; the others against `none`: nats per token, cosine, relative error."""

    quantize: str
    weights_mib: float
    loss: float
    cosine: float
    relative: float
    held_out: float
    rows_per_second: float


def main(
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 60,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where all figures go.")] = None,
) -> None:
    """Stage 1 on SMILES with SmolLM2, the same rows for all."""
    quiet()
    ranks = Ranks.start(600)
    with tempfile.TemporaryDirectory() as folder:
        gradients: dict[str, Tensor] = {}
        found = [_measure(kind, steps, Path(folder), ranks, gradients) for kind in KINDS]
    table = Table(title=f"SmolLM2 in bf16 on {hardware()}: <SMILES> for {steps} steps of 16 molecules")
    for title in (
        "quantize",
        "weights, MiB",
        "loss",
        "gradient: cosine",
        "relative error",
        "held out",
        "of none",
        "rows/s",
    ):
        table.add_column(title, justify="left" if title == "quantize" else "right")
    for f in found:
        table.add_row(
            f.quantize, f"{f.weights_mib:.1f}", f"{f.loss:.4f}", f"{f.cosine:.4f}", f"{f.relative:.1%}",
            f"{f.held_out:.4f}", f"{f.held_out / found[0].held_out - 1:+.2%}", f"{f.rows_per_second:.1f}",
        )  # fmt: skip
    Console(width=140).print(table)
    if json_file:
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "hardware": hardware()}
        json_file.write_text(json.dumps({**about, "steps": steps, "figures": [f._asdict() for f in found]}, indent=1))


def _measure(kind: str, steps: int, folder: Path, ranks: Ranks, gradients: dict[str, Tensor]) -> Figures:
    config = parse_as(RunConfig, _config(kind, steps, folder / kind), kind)
    built = build(read_stage(config, kind), ranks)
    examples = built.examples("train")[0]
    batch = built.collator()([examples[i] for i in range(PROMPTS)])
    loss = total(built.model(batch).sums, count(batch), built.stage.weights)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = built.model.tags.learned_TD.grad
    assert gradient is not None
    gradients[kind] = gradient.clone()
    weights = sum(p.nbytes for p in built.backbone.model.parameters()) / 2**20
    expected = gradients["none"]
    del built
    started = time.monotonic()
    run = train(config, kind, StopRequest())
    seconds = time.monotonic() - started
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [line["valid/loss"] for line in lines if "valid/loss" in line][-1]
    return Figures(
        kind, weights, float(loss.detach()),
        float(torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)),
        float((gradient - expected).norm() / expected.norm()), held_out, steps * 16 / seconds,
    )  # fmt: skip


def _config(kind: str, steps: int, output: Path) -> dict[str, Any]:
    source = {
        "recipe": "rdkit-nci", "template": "The SMILES of the molecule is <SMILES> {smiles}",
        "max_characters": {"smiles": 60}, "rows": {"train": 2000, "valid": 100, "test": 4},
    }  # fmt: skip
    return {
        "output": str(output), "backbone": {"model": "smollm2", "dtype": "bf16", "quantize": kind},
        "tags": {"SMILES": {"length": 10}}, "data": {"sources": [source]},
        "optim": {"steps": steps, "rows_per_step": 16, "rows_per_micro_batch": 16},
        "evaluation": {"every_steps": 10_000},
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
