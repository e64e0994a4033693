"""The commands: what each takes, and where its work is done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tagllm import __version__, launched
from tagllm.errors import UserError
from tagllm.telling import leave, telling

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teach a frozen LLM with input tags.",
)
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config values to override.")]
Offline = Annotated[bool, typer.Option("--offline", help="Block every call to a hub.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def check(
    config: Path,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks the run will have.")] = 1,
    rows: Annotated[bool, typer.Option("--rows", help="Read and tokenise every row, too, and keep that.")] = False,
    offline: Offline = False,
) -> None:
    """Check a config, its libraries, templates and data files. Loads no weights; reports every mistake at once."""

    def work() -> None:
        launched.require_alone("check")
        from tagllm.check import check_config

        for line in check_config(config, overrides or [], ranks, rows):
            print(line)

    telling(work, offline)


@app.command()
def prepare(
    name: Annotated[str | None, typer.Argument(help="A named data set; without one they are listed.")] = None,
    origin: Annotated[Path | None, typer.Option("--from", help="Files to make it from, if it asks for them.")] = None,
    offline: Offline = False,
) -> None:
    """Prepare a named data set for `recipe: NAME`: cached, checksummed, with its licence; or list them."""

    def work() -> None:
        launched.require_alone("prepare")
        from rich.console import Console

        from tagllm.data.prepare import describe, prepare, table_of
        from tagllm.data.recipes import recipe_of
        from tagllm.files import cache_folder

        console = Console(highlight=False, markup=False, soft_wrap=True)
        if name is None:
            console.print(table_of(cache_folder()))
            return
        for line in describe(prepare(recipe_of(name), origin, cache_folder())):
            console.print(line)

    telling(work, offline)


@app.command()
def plan(
    config: Path,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks in all.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of a GPU.")] = 80,
    node_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s that a GPU sends inside its node.")] = 300,
    network_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s that a GPU sends to other nodes.")] = 25,
    tflops: Annotated[float, typer.Option(min=0.001, help="What a GPU sustains.")] = 300,
    offline: Offline = False,
) -> None:
    """Memory, communication, time and placement of a config on given hardware. Loads no weights."""

    def work() -> None:
        launched.require_alone("plan")
        from rich.console import Console

        from tagllm.plan import Hardware
        from tagllm.plan_report import plan_config

        console = Console(highlight=False, soft_wrap=True)
        hardware = Hardware(gpus, gpus_per_node, gpu_memory, node_bandwidth, network_bandwidth, tflops)
        for part in plan_config(config, overrides or [], hardware):
            console.print(part)

    telling(work, offline)


@app.command()
def train(config: Path, overrides: Overrides = None, offline: Offline = False) -> None:
    """Train the tags of a config. Alone, or under torchrun or deepspeed. Starting it again goes on where it stopped."""

    def work() -> None:
        from tagllm.train.signals import Stopped, StopRequest

        try:
            with StopRequest() as stop:  # the imports below take seconds
                from tagllm.config_file import load_config

                loaded = load_config(config, overrides)  # so its mistakes are told at once
                from tagllm.train.loop import train as run_training

                run_training(loaded, str(config), stop)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.status)

    telling(work, offline)


@app.command()
def sweep(
    config: Path,
    overrides: Overrides = None,
    grid: Annotated[list[str] | None, typer.Option(help="KEY=VALUE,VALUE,... ; several of them are combined.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination.")] = 3,
    variants: Annotated[Path | None, typer.Option(help="YAML of named variants, each with what it sets.")] = None,
    tune: Annotated[
        str | None, typer.Option(help="KEY=VALUE,VALUE,... ; each combination takes the best on validation.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each on a GPU of its own.")] = 1,
    only: Annotated[
        int | None, typer.Option(min=0, help="One run alone, counted from 0 ($SLURM_ARRAY_TASK_ID), and no table.")
    ] = None,
    offline: Offline = False,
) -> None:
    """Train and score a config for every combination of values, several seeds each. Start it again to resume."""

    def work() -> None:
        from tagllm.sweep.points import Sweep
        from tagllm.sweep.run import run_one, run_sweep
        from tagllm.sweep.summary import describe, summaries, write_summary

        launched.require_alone("sweep")
        found = Sweep.of(config, overrides or [], grid or [], seeds, variants, tune)
        if only is not None:
            run_one(found, only)
            return
        try:
            run_sweep(found, jobs)
        finally:  # of what is finished
            finished = summaries(found)
            if any(summary.runs for summary in finished):  # or a table of before would be lost
                write_summary(found, finished)
                print("\n".join(describe(finished)))

    telling(work, offline)


@app.command(name="eval")
def evaluate(
    run: Path,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    control: Annotated[
        list[Path] | None, typer.Option(help="A library whose tags take the place of ours of their kind.")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also without each tag, with its rows reordered, and with swapped tags.")
    ] = False,
    offline: Offline = False,
) -> None:
    """Score a run on held-out rows, beside baselines and controls on the same rows; writes RUN/results.json.

    Of other rows than those to test in RUN/SPLIT/, with overrides that ask for other rows in a folder that it names.
    """

    def work() -> None:
        from tagllm.config import SPLITS
        from tagllm.errors import did_you_mean
        from tagllm.evaluation import describe
        from tagllm.evaluation import evaluate as run_evaluation
        from tagllm.run_folder import read_config

        if split not in SPLITS:
            raise UserError(f"--split: {split!r} is no split. {did_you_mean(split, SPLITS)}")
        results = run_evaluation(run, read_config(run, overrides), split, control or [], ablate)
        if launched.rank() == 0:
            print("\n".join(describe(results)))

    telling(work, offline)


@app.command()
def baseline(
    run: Path,
    method: Annotated[
        list[str] | None, typer.Option(help="prompt_tuning, lora, lora_text; several of them, or else all that fit.")
    ] = None,
    lr: Annotated[
        str, typer.Option(help="Learning rates to choose from on validation: 1e-3,3e-3; one is taken as it is.")
    ] = "",
    budget_s: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds of steps of one training; else the run's, times its GPUs."),
    ] = None,
    tune_share: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of --budget-s for each learning rate tried.")
    ] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings at the chosen rate; metrics are their mean.")] = 1,
    virtual: Annotated[int | None, typer.Option(min=1, help="Rows of prompt tuning; else those of the tag.")] = None,
    fit_rows: Annotated[
        int | None, typer.Option(min=1, help="Training rows of each closed-form fit, drawn evenly; else as in the run.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Methods side by side; as the run had it, since seconds count.")] = 1,
    offline: Offline = False,
) -> None:
    """Train PEFT prompt tuning and LoRA, each with a head, on a run's own rows; eval and report then show them."""

    def work() -> None:
        from tagllm.baselines.command import Request, read_rates, run_baselines

        request = Request(method or [], read_rates(lr), budget_s, tune_share, seeds, virtual, fit_rows)
        run_baselines(run, request, jobs)

    telling(work, offline)


@app.command()
def compose(config: Path, overrides: Overrides = None, offline: Offline = False) -> None:
    """Score prompts over libraries of tags, without training: zero-shot composition and its controls, same rows."""

    def work() -> None:
        from tagllm.compose import compose as compose_all
        from tagllm.compose_config import ComposeConfig
        from tagllm.config_file import load_as
        from tagllm.evaluation import describe

        for results in compose_all(load_as(ComposeConfig, config, overrides)):
            if launched.rank() == 0:
                print("\n".join(describe(results)), flush=True)

    telling(work, offline)


@app.command()
def inspect(
    library: Path,
    model: Annotated[
        str | None, typer.Option(help="The backbone, where it is not found under the library's name.")
    ] = None,
    nearest: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 5,
    projector: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard's embedding projector: tag rows among tokens.")
    ] = None,
    offline: Offline = False,
) -> None:
    """What the rows of a library's tags lie near in the vocabulary, and how alike the tags are."""

    def work() -> None:
        launched.require_alone("inspect")
        from rich.console import Console

        from tagllm.head import fields_alone
        from tagllm.report.tags import Vocabulary, inspect_library, write_projector
        from tagllm.tags import TagLibrary

        found = TagLibrary.load(library)
        vocabulary = Vocabulary.of(found, library, model)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        for table in inspect_library(found, vocabulary, nearest):
            console.print(table)
        if told := fields_alone({name: tag.head for name, tag in found.tags.items()}):
            console.print(told)
        if projector is not None:
            number = write_projector(found, vocabulary, nearest, projector)
            console.print(f"{projector}: {number} points; tensorboard --logdir {projector}, tab PROJECTOR")

    telling(work, offline)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs that eval has scored.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")] = Path("report"),
) -> None:
    """One page of all runs: results beside baselines, learning curves, predictions, tags; opens offline."""

    def work() -> None:
        launched.require_alone("report")
        from tagllm.report.page import write_report

        print(write_report(runs, out))

    telling(work, offline=False)


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_LIBRARY")],
    input_file: Annotated[Path, typer.Argument(metavar="INPUT")],
    output_file: Annotated[Path, typer.Argument(metavar="OUTPUT")],
    overrides: Overrides = None,
    tag: Annotated[str | None, typer.Option(help="The function tag that answers, if there are several.")] = None,
    template: Annotated[str | None, typer.Option(help="Another prompt than the one the tag was trained in.")] = None,
    library: Annotated[list[Path] | None, typer.Option(help="More libraries, for tags the template names.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest text to generate; as eval does unless given.")
    ] = None,
    offline: Offline = False,
) -> None:
    """Add predictions to a file: regression, classes or text, in new columns; bad rows stay in place with the reason.

    Overrides are those of the backbone and the engine, as in backbone.model=FOLDER.
    """

    def work() -> None:
        from tagllm.predict import Request, predict_file
        from tagllm.run_folder import settings_to_answer

        folder = source / "library" if (source / "config.yaml").is_file() else source
        backbone, engine = settings_to_answer(source, overrides or [])
        request = Request([folder, *(library or [])], backbone, tag, template, batch, max_new_tokens, engine)
        done = predict_file(request, input_file, output_file)
        told = f"{output_file}: {done.rows} rows, {done.failed} without a prediction"
        told += f", {done.cut} cut to the tokens there is room for" if done.cut else ""
        told += f", {done.emptied} with cells left empty that are no text" if done.emptied else ""
        if launched.rank() == 0:
            print(told)

    telling(work, offline)


def main() -> None:
    try:
        app()
    except SystemExit as end:
        leave(end)
