"""The state of a run on disk: a save that is cut off anywhere leaves the state before it, and damage is found.

    checkpoints/step-00000050/state.safetensors   learned rows, heads and their scales, moments; best rows
                                                    and heads
                              progress.json       counters, the best loss and its step
                              manifest.json       written last: size and sha256 of the two above, and of itself
    checkpoints/.tmp-50-<uuid>/                   a save under way, or a dead one; never read

No collectives here: rank 0 calls `save` and tells the others how it went.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tagllm.config import digest_of
from tagllm.errors import UserError
from tagllm.files import (
    DamagedFile,
    fsync_folder,
    json_bytes,
    load_tensors,
    read_json,
    remove_folder,
    replace_folder,
    sha256_file,
    tensor_bytes,
    write_durably,
)
from tagllm.origin import versions

FORMAT = 1
_log = logging.getLogger(__name__)
STATE, PROGRESS, MANIFEST = "state.safetensors", "progress.json", "manifest.json"


class TrainState(NamedTuple):
    """All that training needs to go on as if it had never stopped: which rows a step sees follows from config, data
    and the number of the step, and nothing in a step is random."""

    step: int
    tensors: dict[str, torch.Tensor]
    """Learned rows, heads, optimizer moments."""
    progress: dict[str, Any]
    """What JSON can hold, string keys only: counters, best loss (which may be inf or NaN)."""
    identity: dict[str, str]
    """Digests of what the run was started with: backbone, tokenizer, data, config."""


class SaveFailed(Exception):
    """A checkpoint that could not be written. Training can go on; the checkpoints before it are untouched."""

    def __init__(self, folder: Path, step: int, bytes_needed: int, reason: object) -> None:
        self.bytes_needed = bytes_needed
        super().__init__(
            f"{folder}: the checkpoint of step {step} was not written: {reason}. It needs {bytes_needed} bytes; "
            "the ones before it are untouched. Make room there, or stop and give a folder that can be written."
        )


class UnknownFormat(DamagedFile):
    """An intact manifest of another format version: refused, since going on without it would overwrite it."""


class _FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: int
    step: int = Field(ge=0)
    parent: int | None
    files: dict[str, _FileEntry]
    libraries: dict[str, str]
    identity: dict[str, str]
    digest: str


def save(folder: Path, state: TrainState, keep: int) -> Path:
    """Writes `state` as `folder/step-<n>` and prunes to the `keep` newest valid ones.

    A valid checkpoint of the same step, identity and progress is kept as it is; one that is damaged, or knows less of
    the progress (a run stopped behind its last step and then finished), is replaced.

    Raises:
        SaveFailed: the operating system refused (disk full, read-only, EIO) or what was read back differs.
        UserError: a valid checkpoint of the same step has another identity, or another format version.
    """
    if keep < 2:
        raise ValueError(f"keep is {keep}; it must be at least 2, for the newest may turn out damaged")
    final = folder / f"step-{state.step:08d}"
    tmp = folder / f".tmp-{state.step}-{uuid.uuid4().hex}"
    files = {STATE: tensor_bytes(state.tensors), PROGRESS: json_bytes(state.progress)}
    bytes_needed = sum(map(len, files.values()))
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            fsync_folder(folder.parent)
        for dead in folder.glob(".tmp-*"):  # before writing: they may be what fills the disk
            remove_folder(dead)
        there = _read_whole(final)[0] if final.exists() else None
        if there is not None:
            check_identity(there, state.identity)
        if there is not None and json_bytes(there.progress) == files[PROGRESS]:
            fsync_folder(folder)  # the one who wrote it may have died just before doing so
        else:
            parent = max((step for step, _ in _steps(folder) if step < state.step), default=None)
            files[MANIFEST] = _manifest_bytes(state, parent, files)  # the last to be written
            bytes_needed = sum(map(len, files.values()))
            tmp.mkdir()
            for name, data in files.items():
                write_durably(tmp / name, data)
            replace_folder(tmp, final)
            if problems := verify(final):
                _hide_and_remove(final)
                raise SaveFailed(folder, state.step, bytes_needed, f"read back, {'; '.join(problems)}")
    except OSError as error:
        raise SaveFailed(folder, state.step, bytes_needed, error) from error
    finally:
        remove_folder(tmp)
    _prune(folder, state.step, keep)
    return final


def load_newest(folder: Path) -> tuple[TrainState | None, list[str]]:
    """The newest state that verifies (None if there is none), and one line for each newer one that was skipped.

    Raises:
        UserError: the folder cannot be listed.
        UnknownFormat: a newer one is intact but of another format version.
    """
    skipped: list[str] = []
    try:
        steps = _steps(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error}. Mend that, or give a new output folder.") from None
    for _, path in reversed(steps):
        state, problems = _read_whole(path)
        if state is not None:
            return state, skipped
        skipped.append(f"{path}: skipped: {'; '.join(problems)}.")
    return None, skipped


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint at `path`, each beginning with the name of the file; empty if it is whole."""
    try:
        return _read_whole(path)[1]
    except UnknownFormat as error:
        return [f"{error.path.name}: {error.reason}"]


def check_identity(state: TrainState, identity: Mapping[str, str]) -> None:
    """Refuses to go on from a state that another backbone, tokenizer, data or config made.

    Raises:
        UserError: one line per item that differs, with both digests.
    """
    problems = [
        f"{item}: the checkpoint of step {state.step} was made with {state.identity.get(item, 'none')}, this run has "
        f"{identity.get(item, 'none')}; a run goes on only with the same {item}. Restore the old {item}, or give a "
        "new output folder (output=...) to start afresh."
        for item in sorted(state.identity.keys() | identity.keys())
        if state.identity.get(item) != identity.get(item)
    ]
    if problems:
        raise UserError(*problems)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    matches = [match for name in names if (match := re.fullmatch(r"step-([0-9]{8,15})", name))]
    return sorted((int(match[1]), folder / match[0]) for match in matches)


def _read_whole(path: Path) -> tuple[TrainState | None, list[str]]:
    """The state at `path`, or what is wrong with it. Raises `UnknownFormat`."""
    try:
        manifest = _read_manifest(path)
        if problems := _compare(path, manifest):
            return None, problems
        state = TrainState(manifest.step, load_tensors(path / STATE), read_json(path / PROGRESS), manifest.identity)
    except UnknownFormat:
        raise
    except DamagedFile as error:
        return None, [f"{error.path.name}: {error.reason}"]
    except OSError as error:
        return None, [str(error)]
    return state, []


def _read_manifest(path: Path) -> _Manifest:
    file = path / MANIFEST
    raw = read_json(file)
    rest = {key: value for key, value in raw.items() if key != "digest"}
    try:
        # Byte for byte too: a flipped bit that JSON does not see is still a flipped bit.
        intact = raw.get("digest") == digest_of(rest) and json_bytes(raw) == file.read_bytes()
    except RecursionError:
        intact = False
    if not intact:
        raise DamagedFile(file, "its own digest does not match")
    if raw.get("format") != FORMAT:
        raise UnknownFormat(file, f"format is {raw.get('format')!r:.80}; this tagllm reads {FORMAT}")
    try:
        manifest = _Manifest.model_validate(raw)
    except ValidationError as error:
        raise DamagedFile(file, f"{error.error_count()} wrong entries, the first: {error.errors()[0]['msg']}") from None
    if manifest.files.keys() != {STATE, PROGRESS}:
        raise DamagedFile(file, f"it must list {STATE} and {PROGRESS}, nothing else")
    if path.name != f"step-{manifest.step:08d}":
        raise DamagedFile(file, f"step is {manifest.step} but the folder is {path.name}")
    return manifest


def _compare(path: Path, manifest: _Manifest) -> list[str]:
    expected, found = {STATE, PROGRESS, MANIFEST}, set(os.listdir(path))
    problems = [f"{name}: missing" for name in sorted(expected - found)]
    problems += [f"{name!r}: does not belong here" for name in sorted(found - expected)]
    for name in sorted(manifest.files.keys() & found):
        entry, num_bytes = manifest.files[name], os.path.getsize(path / name)
        if num_bytes != entry.bytes:
            problems.append(f"{name}: {num_bytes} bytes, the manifest says {entry.bytes}")
        elif (sha256 := sha256_file(path / name)) != entry.sha256:
            problems.append(f"{name}: sha256 {sha256}, the manifest says {entry.sha256}")
    return problems


def _manifest_bytes(state: TrainState, parent: int | None, files: Mapping[str, bytes]) -> bytes:
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "parent": parent,
        # Of the bytes in memory: a sum taken from the disk would bless what was written wrongly.
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
        "libraries": versions(),
        "identity": state.identity,
    }
    return json_bytes({**manifest, "digest": digest_of(manifest)})


def _prune(folder: Path, new_step: int, keep: int) -> None:
    """Removes all beyond the `keep` newest valid ones; a damaged one among those stays until it is older.

    The save has succeeded by now, so what cannot be removed is a warning, and the next prune tries again.
    """
    kept = 0
    try:
        for step, path in reversed(_steps(folder)):
            if kept < keep or step == new_step:
                kept += not verify(path)
            else:
                _hide_and_remove(path)
    except OSError as error:
        _log.warning("%s: old checkpoints not removed: %s. The next save tries again.", folder, error)


def _hide_and_remove(path: Path) -> None:
    """Renamed first, so that a removal that is cut off does not look like damage."""
    hidden = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    os.rename(path, hidden)
    remove_folder(hidden)
