"""One writer a folder, however its process ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from tagllm.errors import UserError
from tagllm.files import DamagedFile, json_bytes, read_json


class RunLock:
    """One writer per run folder: `with RunLock(run): ...`. The kernel frees it when the process dies, however it does.
    With `wait` it waits for another one to leave: for what is written in a moment.

    Raises:
        UserError: on entering, if another process holds it (named by host and pid), or the folder cannot be locked.
    """

    def __init__(self, run: Path, wait: bool = False) -> None:
        self.path = run / ".lock"
        self._operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        self._file = -1

    def __enter__(self) -> Self:
        assert self._file not in _held, "entered twice"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _held.add(self._file)
            fcntl.flock(self._file, self._operation)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json_bytes({"host": socket.gethostname(), "pid": os.getpid()}), 0)
        except BlockingIOError:
            holder = self._holder()
            self.release()
            raise UserError(
                f"{self.path.parent}: another process is writing here: {holder}. A run folder has one writer. "
                "Wait for it, stop it, or write to another folder."
            ) from None
        except (FileExistsError, NotADirectoryError):
            first = next(path for path in [*self.path.parents][::-1] if os.path.lexists(path) and not path.is_dir())
            raise UserError(f"{self.path.parent}: cannot be made: {first} is no folder. Give another folder.") from None
        except OSError as error:
            self.release()
            raise UserError(
                f"{self.path}: cannot be locked: {error}. The output folder must be writable and on a file system "
                "with locks (Lustre: mounted with -o flock). Write to another one."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Closes the lock. The file stays: removing it would let two writers lock two files of one name."""
        if self._file in _held:  # not so in a forked child, where the number may be another file's by now
            _held.remove(self._file)
            os.close(self._file)
        self._file = -1

    def _holder(self) -> str:
        try:
            holder = read_json(self.path)
        except DamagedFile:  # between its lock and its line
            return "one that has just begun"
        return f"pid {holder.get('pid')} on host {holder.get('host')}"


_held: set[int] = set()


def _drop_inherited_locks() -> None:
    # A forked loader worker shares the lock; one that outlives the trainer would lock out its successor.
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_drop_inherited_locks)
