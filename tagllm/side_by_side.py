"""`tagllm` in processes of its own, several side by side, each with its share of the cores and GPUs."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Event
from typing import NamedTuple

import torch

from tagllm.errors import UserError


class Script(NamedTuple):
    """What one process does after another: the arguments of each `tagllm`. `name`: for people."""

    name: str
    commands: list[list[str]]


def run_side_by_side(scripts: Sequence[Script], jobs: int) -> list[str]:
    """`jobs` at a time. One that fails stops no other; returned is a line for each of those. When this process is told
    to stop, so are they: each saves where it stands."""
    free: Queue[dict[str, str]] = Queue()
    for share in shares(jobs, os.environ, torch.cuda.device_count(), num_cores()):
        free.put(share)
    running, stopping = set[subprocess.Popen[str]](), Event()

    def begin(at: int) -> list[str]:
        print(f"{at + 1} of {len(scripts)}: {scripts[at].name}", flush=True)
        share = free.get()
        try:
            run_script(scripts[at], os.environ | share, running, stopping)
        except UserError as error:
            return list(error.problems)
        finally:
            free.put(share)
        return []

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [problem for found in pool.map(begin, range(len(scripts))) for problem in found]
        except (SystemExit, KeyboardInterrupt):
            stopping.set()
            for process in list(running):
                process.terminate()
            raise


def shares(jobs: int, environment: Mapping[str, str], num_gpus: int, num_cores: int) -> list[dict[str, str]]:
    """What each of the scripts side by side has set: its cores, unless OMP_NUM_THREADS says how many, and a GPU of its
    own, of those that CUDA_VISIBLE_DEVICES names or else of all. With fewer GPUs than jobs they take turns. One alone
    is left everything."""
    if jobs == 1:
        return [{}]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    named = map(str, range(num_gpus)) if visible is None else (name.strip() for name in visible.split(","))
    devices = list(itertools.takewhile(lambda name: name not in ("", "-1"), named))  # CUDA stops there too
    share = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(max(1, num_cores // jobs)))}
    if not devices:
        return [share] * jobs
    return [share | {"CUDA_VISIBLE_DEVICES": devices[at % len(devices)]} for at in range(jobs)]


def num_cores() -> int:
    """That this process may use: of a Slurm job, say, those that it was given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_script(
    script: Script, environment: Mapping[str, str], running: set[subprocess.Popen[str]], stopping: Event
) -> None:
    """Each process is in `running` while it lives; none is begun once it is `stopping`.

    Raises:
        UserError: one of them failed; its last line is in the message.
    """
    for command in script.commands:
        if stopping.is_set():
            return
        process = subprocess.Popen(
            [sys.executable, "-m", "tagllm", *command], stderr=subprocess.PIPE, text=True, env=environment
        )
        running.add(process)
        if stopping.is_set():  # set between the two
            process.terminate()
        told = process.communicate()[1]
        running.remove(process)
        if process.returncode:
            raise UserError(f"{script.name}: tagllm {command[0]} {_ended(process.returncode, told)}")


def _ended(status: int, told: str) -> str:
    if status == -signal.SIGKILL:
        return (
            "was killed, as Linux does where memory runs out. The same command goes on; fewer --jobs need less of it."
        )
    last = (told.strip().splitlines() or ["no message"])[-1]
    return f"left with {status}: {last}"
