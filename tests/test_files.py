"""Durable files: whole or not there, damage told as one typed error, one writer a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagllm import files, run_lock
from tagllm.errors import UserError
from tagllm.files import DamagedFile
from tagllm.run_lock import RunLock

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 2**32),
    transposed=st.booleans(),
)
def test_tensors_come_back_bit_for_bit(
    dtype: torch.dtype, shape: list[int], seed: int, transposed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random_bytes = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    tensor = random_bytes.to(torch.uint8).view(dtype).squeeze(-1)  # any bits, so NaNs with payloads and -0.0 too
    if transposed:
        tensor = tensor.mT if tensor.dim() > 1 else tensor
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    files.save_tensors(path, {"one": tensor, "shares its storage": tensor})
    loaded = files.load_tensors(path)
    for name in ("one", "shares its storage"):
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_hostile_tensor_files_raise_only_damaged_file(tmp_path: Path) -> None:
    good = files.tensor_bytes({"a": torch.arange(40.0), "b": torch.zeros(3, dtype=torch.bfloat16)})
    header = len(json.dumps({})).to_bytes(8, "little")
    bad = {
        "empty": b"",
        "header of 2^63": (2**63).to_bytes(8, "little") + good[8:],
        "header past the end": (len(good)).to_bytes(8, "little") + good[8:],
        "tail": good + b"x",
        "data without header": header + b"{}" + b"xxxx",
        "pickle": pickle.dumps({"a": 1}),
        "unknown dtype": good.replace(b'"F32"', b'"X32"'),
    }
    for name, data in bad.items():
        path = tmp_path / "a.safetensors"
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match=r"a\.safetensors: cannot be used: it is not a safetensors file"):
            pytest.fail(f"{name}: loaded as {files.load_tensors(path)}")
    rng = random.Random(0)
    for _ in range(1000):
        mutated = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(200)] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            files.load_tensors(path)
        except DamagedFile:
            continue
    with pytest.raises(DamagedFile, match="there is no such file"):
        files.load_tensors(tmp_path / "none")
    with pytest.raises(DamagedFile, match="Is a directory"):
        files.load_tensors(tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it is not JSON"),
        (b"[1]", "it holds a list; it must hold an object"),
        (b" " * (files.MAX_JSON_BYTES + 1), "more than we ever write"),
    ],
)
def test_hostile_json_raises_only_damaged_file(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=reason) as caught:
        files.read_json(path)
    assert caught.value.path == path
    assert len(str(caught.value)) < 500


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"none\.json: cannot be used: there is no such file"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(DamagedFile, match="Is a directory"):
        files.read_json(tmp_path)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    files.write_durably(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replace_folder_puts_the_new_one_in_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("old", "new"):
        (tmp_path / ".tmp-1").mkdir()
        files.write_durably(tmp_path / ".tmp-1" / content, b"")
        files.replace_folder(tmp_path / ".tmp-1", tmp_path / "final")
        assert os.listdir(tmp_path) == ["final"]
        assert os.listdir(tmp_path / "final") == [content]


def half(path: Path) -> None:
    path.write_bytes(b"half")
    raise UserError("cut off")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Whoever else writes the same."""
    files.write_whole(tmp_path / "file", b"old")
    with files.appearing(tmp_path / "file") as one, files.appearing(tmp_path / "file") as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
        assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"one", "the outer block ends last"
    with pytest.raises(UserError), files.appearing(tmp_path / "file") as cut_off:
        half(cut_off)
    assert (tmp_path / "file").read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_removed_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").touch()
    files.remove_folder(tmp_path / "a")
    assert "a: not removed" in caplog.text
    files.remove_folder(tmp_path / "none")


def test_lock_is_refused_while_held_and_names_the_holder(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=f"another process is writing here: pid {os.getpid()} on host ")
    with RunLock(tmp_path), refused:
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_lock_of_a_folder_that_cannot_be_one_names_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for folder, first in (("file", "file"), ("file/deep", "file"), ("link", "link")):
        with pytest.raises(UserError, match=f"{folder}: cannot be made: {tmp_path / first} is no folder"):
            RunLock(tmp_path / folder).__enter__()


def test_lock_can_wait_for_its_holder(tmp_path: Path) -> None:
    left: list[str] = []

    def second() -> None:
        with RunLock(tmp_path, wait=True):
            left.append("second")

    waiting = threading.Thread(target=second)
    with RunLock(tmp_path):
        waiting.start()
        waiting.join(0.2)
        left.append("first")
    waiting.join(10)
    assert left == ["first", "second"]


def test_lock_is_taken_over_when_its_holder_was_killed_though_its_workers_live(tmp_path: Path) -> None:
    ready, told = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            with RunLock(tmp_path / "run"):
                worker = os.fork()  # a loader worker, which outlives the trainer
                if worker:
                    os.write(told, str(worker).encode())
                time.sleep(60)
        finally:
            os._exit(1)
    worker = int(os.read(ready, 100))
    try:
        with pytest.raises(UserError, match=f"pid {holder} on host"):
            RunLock(tmp_path / "run").__enter__()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(worker, 0)
        time.sleep(0.1)  # the worker closes its copy on its first instructions after the fork
        with RunLock(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(ready)
        os.close(told)


def test_lock_on_a_file_system_without_locks_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(UserError, match=r"cannot be locked: .*Operation not supported"):
        RunLock(tmp_path).__enter__()
    assert not run_lock._held
