"""The commands. A user's mistake is one line per problem on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tagllm import __version__
from tagllm.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teach a frozen LLM with input tags.",
)
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config values to override.")]
Offline = Annotated[bool, typer.Option("--offline", help="Block every call to a hub.")]


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def check(
    config: Path,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks the run will have.")] = 1,
    offline: Offline = False,
) -> None:
    """Check a config, its libraries, templates and data files. Loads no weights; reports every mistake at once."""

    def work() -> None:
        from tagllm.check import check_config

        for line in check_config(config, overrides or [], ranks):
            print(line)

    _run(work, offline)


@app.command()
def train(config: Path, overrides: Overrides = None, offline: Offline = False) -> None:
    """Train the tags of a config. Alone, or under torchrun or deepspeed. Starting it again goes on where it stopped."""

    def work() -> None:
        from tagllm.config import load_config
        from tagllm.train.loop import train as run_training
        from tagllm.train.signals import EXIT_STOPPED, Stopped

        try:
            run_training(load_config(config, overrides), str(config))
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(EXIT_STOPPED)

    _run(work, offline)


def _run(work: Callable[[], None], offline: bool) -> None:
    """Runs a command; turns what the user can mend into lines. Under a launcher, shared errors come from rank 0 only."""
    if offline:  # read by the libraries when they are imported, so before that
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        work()
    except UserError as error:
        shared = type(error).__name__ == "SharedError" and os.environ.get("RANK", "0") != "0"
        for problem in [] if shared else error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    app()
