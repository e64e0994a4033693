"""Ranks that are spared their imports: one process has done them, and forks a rank for whoever asks.

torch, transformers and DeepSpeed take ten times as long to import as a run of 40 steps takes, and a fault costs up to
ten starts of two ranks. Whoever asks, `tests.faults.rank`, is the rank to its launcher: it hands signals on, ends as
the rank ends, and killed takes it along. What a plan orders strikes the rank itself: its process id is in the history.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOOK_EVERY_S = 0.01
"""For ranks that have ended."""


@contextmanager
def warm_ranks(path: Path) -> Iterator[None]:
    """Ranks started in here are forked; `path` is the socket."""
    command = [sys.executable, "-m", "tests.faults.zygote", str(path)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE) as zygote:
        while not path.exists():
            assert zygote.poll() is None, "the zygote ended before it was ready"
            time.sleep(0.02)
        os.environ["ZYGOTE"] = str(path)
        try:
            yield
        finally:
            del os.environ["ZYGOTE"]
            assert zygote.stdin
            zygote.stdin.close()


def ask(path: str) -> NoReturn:
    """Stands for a rank with the arguments, environment, folder and open files of this process."""
    asker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asker.connect(path)
    request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(asker, [request], [0, 1, 2])
    for number in HANDED_ON:
        signal.signal(number, lambda number, frame: asker.send(bytes([number])) and None)
    code = os.waitstatus_to_exitcode(int(asker.recv(16)))
    if code < 0:
        for number in HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: Path) -> None:
    """Returns in each rank, which then is what asked for it. The process itself ends with its standard input."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    ranks: dict[socket.socket, int] = {}
    while True:
        readable, _, _ = select.select([sys.stdin, listener, *ranks], [], [], LOOK_EVERY_S if ranks else None)
        if sys.stdin in readable:
            for pid in ranks.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        for asker in [asker for asker in readable if asker in ranks]:  # before anybody is served who comes after
            if said := asker.recv(1):
                os.kill(ranks[asker], said[0])
            else:
                os.kill(ranks[asker], signal.SIGKILL)
                os.waitpid(ranks.pop(asker), 0)
                asker.close()
        _tell_of_the_dead(ranks)
        if listener in readable:
            asker, _ = listener.accept()
            request, files, _, _ = socket.recv_fds(asker, 1 << 20, 3)
            if not (pid := os.fork()):
                for other in (listener, asker, *ranks):
                    other.close()
                return _become(request, files)
            for file in files:
                os.close(file)
            ranks[asker] = pid


def _tell_of_the_dead(ranks: dict[socket.socket, int]) -> None:
    for asker, pid in list(ranks.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with suppress(OSError):  # it is gone too
                asker.send(str(status).encode())
            asker.close()
            del ranks[asker]


def _become(request: bytes, files: list[int]) -> None:
    os.setsid()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    arguments, environment, folder = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[1:] = arguments


_OF_RANKS = (
    "datasets", "deepspeed", "pyarrow.compute", "pyarrow.parquet", "scipy.stats", "sklearn.model_selection",
    "tensorboard.compat.proto.event_pb2", "tensorboard.compat.proto.summary_pb2",
    "tensorboard.summary.writer.record_writer", "torchmetrics.functional",
    "transformers.models.llama.modeling_llama", "tagllm.cli", "tagllm.train.loop", "tests.faults.hooks",
)  # fmt: skip
"""What a rank imports until it has validated once."""

if __name__ == "__main__":
    from tests.faults.rank import run

    for module in _OF_RANKS:
        importlib.import_module(module)

    serve(Path(sys.argv[1]))
    run()
