"""tagllm against everything a user could pick instead: `python -m benchmarks.vs_peers --json FILE`.

One run on one machine, the same backbone, rows, dtype, batch and attention backend for all. The peers need
`launch/setup_venv.sh quickstart dev benchmarks`.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from benchmarks.contestant import Contestant
from benchmarks.measure import alternate, kept_bytes, matmul_rate, seconds_of, tune
from benchmarks.models import Models, Settings, tiny_model
from benchmarks.ours import Ours, ours
from benchmarks.peak import ROWS, peak_of
from benchmarks.peers import peers
from benchmarks.report import Encoding, Figures, Result, as_json, result_table, target_table, verdicts
from benchmarks.workloads import ALIKE, WORKLOADS, Workload, available, build_workload
from tagllm.model.backbone import DTYPES, fastest_dtype
from tagllm.origin import commit, hardware

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "tagllm")
NEED_PEERS = {"a", "b", "c", "e"}
say = Console(stderr=True, highlight=False, soft_wrap=True).print


def contestants() -> list[Contestant]:
    return [*peers(), *ours()]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where all figures go.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(WORKLOADS)}; may be repeated.")] = None,
    only: Annotated[str, typer.Option(help="Letters of contestants, as in a,d,i.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Alternating repeats.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 32 rows that a repeat times.")] = 1,
    model: Annotated[str, typer.Option(help="smollm2, a folder, or a hub name.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto: which multiplies faster here.")] = "auto",
    protein_tokens: Annotated[int, typer.Option(min=8, help="Residues kept of each protein.")] = 256,
    memory: Annotated[
        bool | None, typer.Option(help="Peak memory, each contestant in a process of its own; off with --quick.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A tiny random model and few rows: does everything run? No figures.")
    ] = False,
) -> None:
    """Times tagllm and its peers on the same rows and prints tables, the last one against the targets."""
    started = time.monotonic()
    names = _known(workload or available(), available(), "--workload")
    chosen = _known([x for x in only.split(",") if x] or [c.letter for c in contestants()],
                    [c.letter for c in contestants()], "--only")  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = [name for name in ("peft", "trl") if find_spec(name) is None]
    if missing and set(chosen) & NEED_PEERS:
        raise SystemExit(
            f"{' and '.join(missing)} not installed; {', '.join(x for x in chosen if x in NEED_PEERS)} need them. Run "
            "launch/setup_venv.sh quickstart dev benchmarks, or choose others with --only."
        )
    if dtype not in ("auto", *DTYPES):
        raise typer.BadParameter(f"{dtype!r} is none of auto, {', '.join(DTYPES)}", param_hint="--dtype")
    quiet()
    if quick:
        torch.set_num_threads(1)  # threads wait for each other longer than they work on a tiny model
    kind = dtype if dtype != "auto" else "fp32" if quick else fastest_dtype(device)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        settings = Settings(tiny_model(scratch) if quick else model, kind, quick, 24 if quick else protein_tokens)  # type: ignore[arg-type]
        models = Models(settings, scratch)
        config = models.tagged.model.config.get_text_config()
        rate = matmul_rate(DTYPES[settings.dtype], device, config.hidden_size, config.intermediate_size)
        say(f"{settings.dtype} on {hardware()}; measured matmul rate {rate / 1e12:.3f} TFLOP/s")
        gc.freeze()  # what is loaded by now stays: collections between runs need not walk through it
        plan = Plan(chosen, repeats, steps, not quick if memory is None else memory, rate)
        results: list[Result] = []
        for name in names:
            results.append(_measure(name, plan, models, results))
    found = verdicts(results)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for result in results:
        console.print(result_table(result))
    if found:
        console.print(target_table(found))
    if json_file:
        about = {
            "command": "python -m benchmarks.vs_peers " + " ".join(sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "minutes": (time.monotonic() - started) / 60,
            "commit": commit(), "hardware": hardware(),
            "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
            "model": "tiny random" if quick else model, "dtype": settings.dtype, "repeats": repeats,
            "matmul_flops_per_second": rate,
        }  # fmt: skip
        json_file.write_text(json.dumps({**about, "workloads": as_json(results), "targets": as_json(found)}, indent=1))


def _known(wanted: Sequence[str], known: Sequence[str], option: str) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; it must be among {', '.join(known)}", param_hint=option)
    return [name for name in known if name in wanted]


class Plan(NamedTuple):
    """What to do with every workload."""

    letters: list[str]
    repeats: int
    steps: int
    memory: bool
    matmul_rate: float


def _measure(name: str, plan: Plan, models: Models, before: Sequence[Result]) -> Result:
    """One workload: tune everybody, then time in turns, then count bytes."""
    settings = models.settings
    workload = build_workload(name, settings, models.plain, models.scratch, plan.steps)
    say(f"\n{name}: {workload.description}")
    ready = [c for c in contestants() if c.letter in plan.letters]
    tuned = next((result.tuned for result in before if result.name == ALIKE.get(name)), {})
    weigh = plan.memory and not tuned
    sizes: dict[str, int] = {}
    for c in ready:
        c.setup(workload, models)
        rates = tuned.get(c.letter) or tune(c, workload.steps[0], settings.micro_batches)
        sizes[c.letter] = max(rates, key=lambda size: rates[size])
        tuned = {**tuned, c.letter: rates}
        shown = ", ".join(f"{size}: {rate:.2f}" for size, rate in rates.items())
        say(f"  {c.letter:2s} {c.label}: rows/s by rows per micro-batch {shown}")
    times = alternate(
        ready, sizes, workload.steps, plan.repeats,
        lambda letter, repeat, taken: say(f"  repeat {repeat + 1}/{plan.repeats}  {letter:2s} {taken:.2f} s"),
    )  # fmt: skip
    figures = {}
    for c in ready:
        peak = peak_of(c.letter, name, settings) if weigh else None
        rows = [row for step in workload.steps for row in step]
        figures[c.letter] = Figures(
            c.letter, c.label, sizes[c.letter], tuned[c.letter], times[c.letter], len(rows),
            sum(map(c.num_tokens, rows)), kept_bytes(c, workload.chunk(ROWS)) / ROWS,
            peak.process_bytes if peak else None, peak.steps_bytes if peak else None,
            c.ideal_speedup(workload.steps, sizes[c.letter]) if isinstance(c, Ours) else None,
        )  # fmt: skip
    return Result(name, workload.description, figures, _encode(ready, workload, models, plan.matmul_rate))


def _encode(ready: Sequence[Contestant], workload: Workload, models: Models, rate: float) -> Encoding | None:
    """Prefix encoding without memory on the batch size that suits it best; None where (h) does not run."""
    ours = next((c for c in ready if isinstance(c, Ours) and c.letter == "h"), None)
    if ours is None:
        return None
    found = []
    for size in models.settings.micro_batches:
        batch = ours.batches(workload.chunk(size), size)[0]
        taken = min(seconds_of(lambda batch=batch: ours.encode(batch), ours.device) for _ in range(3))  # type: ignore[misc]
        flops, tokens = ours.encoding_flops(batch)
        found.append(Encoding(size, tokens, taken, flops, flops / taken / rate))
    return max(found, key=lambda e: e.utilisation)


def quiet() -> None:
    """Libraries keep their progress bars and advice to themselves."""
    import datasets
    import transformers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    typer.run(main)
