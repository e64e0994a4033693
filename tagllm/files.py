"""Files: written whole under their name or not at all, and read with a line for people where they are damaged."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from tagllm.errors import UserError

MAX_JSON_BYTES = 16 << 20
"""Ours are kilobytes; a parsed hostile one takes some 25 times its size in memory."""
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where tagllm keeps what it can make again: $TAGLLM_CACHE, or tagllm below the user's cache folder."""
    if given := os.environ.get("TAGLLM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tagllm"


CACHE_ELSEWHERE = "Make room, or name another folder for the cache: TAGLLM_CACHE=FOLDER."
"""The way out where `cache_folder` cannot be written."""


class DamagedFile(UserError):
    """A file that is missing, unreadable or not what it should be; names the file and the reason."""

    def __init__(self, path: Path, reason: object) -> None:
        self.path, self.reason = path, str(reason).strip().rstrip(".")
        super().__init__(f"{path}: cannot be used: {self.reason}. Restore it from a copy, or write it anew.")


@contextmanager
def writing(path: Path, way_out: str = "Make room there and start the same command again.") -> Iterator[None]:
    """What the operating system refuses in here is told in one line, with a way out.

    Raises:
        UserError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}. {way_out}") from None


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Writes `data` and returns once the disk has it. The name itself lasts only after `fsync_folder`.

    Raises:
        OSError: the disk is full, read-only or broken; what was written so far stays under `path`.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def fsync_folder(path: Path) -> None:
    """Makes creations, renames and removals of names in `path` last."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def appearing(path: Path, first_stays: bool = False) -> Iterator[Path]:
    """A name to write to. It becomes `path` if the block ends well, so that readers see the old file or the new one,
    else it is removed. Any number may write the same.

    Args:
        first_stays: whoever finishes later leaves the file that is there, since others may have mapped it (over NFS a
            replaced file is gone for them too).
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        if not (first_stays and _linked(temporary, path)):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _linked(file: Path, path: Path) -> bool:
    """Whether `path` is there now, be it this file or an earlier one; not every file system has links."""
    try:
        os.link(file, path)
    except OSError:
        return path.exists()
    return True


@contextmanager
def appearing_folder(final: Path, first_stays: bool = False) -> Iterator[Path]:
    """An empty folder to write into, files durably. It becomes `final` if the block ends well, else it is removed.

    Args:
        first_stays: as for `appearing`.
    """
    temporary = final.with_name(f".tmp-{final.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if not (first_stays and final.exists()):
            replace_folder(temporary, final)
    finally:
        remove_folder(temporary)


def write_whole(path: Path, data: bytes) -> None:
    """`write_durably`, whole under its name or not there."""
    with appearing(path) as temporary:
        write_durably(temporary, data)
    fsync_folder(path.parent)


def replace_folder(tmp: Path, final: Path) -> None:
    """Gives `tmp` (same parent; its files written durably) the name `final`, and removes what stood there.

    Readers see the old folder or the new one. Where the file system cannot exchange two names (NFS), an existing
    `final` is away for the moment between two renames, and a crash just then leaves it as `<tmp>-old`.
    """
    fsync_folder(tmp)
    old = None
    if not final.exists():
        os.rename(tmp, final)
    elif _exchange(tmp, final):
        old = tmp
    else:
        old = tmp.with_name(f"{tmp.name}-old")
        os.rename(final, old)
        os.rename(tmp, final)
    fsync_folder(final.parent)
    if old is not None:
        remove_folder(old)


def remove_folder(path: Path) -> None:
    """Removes a folder that nobody needs any more; if that fails it stays, with a warning in the log."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s: not removed: %s. Nothing reads it; delete it by hand if it stays.", path, error)


def json_bytes(value: Any) -> bytes:
    """The one way we write JSON: sorted, so that equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object (all our files are objects).

    Raises:
        DamagedFile: missing, unreadable, over `MAX_JSON_BYTES`, not UTF-8, not JSON, or no object.
    """
    with _read(path, "JSON"):
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise DamagedFile(path, f"it has over {MAX_JSON_BYTES} bytes, more than we ever write")
        value = json.loads(data.decode())
    if not isinstance(value, dict):
        raise DamagedFile(path, f"it holds a {type(value).__name__}; it must hold an object {{...}}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What stands in each line.

    Raises:
        DamagedFile: missing, unreadable, not UTF-8, or a line that is not JSON, as one that was cut off.
    """
    with _read(path, "JSON"):
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]  # splitlines would split texts at U+2028 too


def read_yaml(path: Path) -> Any:
    """
    Raises:
        DamagedFile: missing, unreadable, not UTF-8, or not YAML.
    """
    with _read(path, "YAML"):
        return yaml.safe_load(path.read_text(encoding="utf-8"))


@contextmanager
def _read(path: Path, form: str) -> Iterator[None]:
    """Says of what cannot be read that, and why."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedFile(path, "there is no such file") from None
    except OSError as error:
        raise DamagedFile(path, error.strerror or error) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DamagedFile(path, f"it is not {form}: {' '.join(str(error).split())}") from None


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The safetensors form of dense `tensors` of any device and stride; two may share their storage. Equal tensors give
    equal bytes."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes `tensors` durably under `path`.

    Raises:
        OSError: as `write_durably`.
    """
    write_durably(path, tensor_bytes(tensors))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU, in memory of their own. Values (NaN rows) are not looked at.

    Raises:
        DamagedFile: missing, unreadable, or not safetensors.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        raise DamagedFile(path, "there is no such file") from None
    except OSError as error:
        raise DamagedFile(path, error.strerror or error) from None
    except Exception as error:  # noqa: BLE001 -- anybody's bytes: safetensors and torch raise many kinds
        raise DamagedFile(path, f"it is not a safetensors file: {error}") from None


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step. False where kernel or file system cannot. (No `os` function does it.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
