"""The save protocol under kills, full disks and bit rot: the old state or the new one, whole, or a named reason."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagllm import files
from tagllm.config import digest_of
from tagllm.errors import UserError
from tagllm.files import json_bytes
from tagllm.train import checkpoint
from tagllm.train.checkpoint import SaveFailed, TrainState, UnknownFormat, check_identity, load_newest, save, verify

IDENTITY = {"backbone": "b" * 64, "tokenizer": "t" * 64, "data": "d" * 64, "config": "c" * 64}
FILES = [checkpoint.STATE, checkpoint.PROGRESS, checkpoint.MANIFEST]
CALLS = ["open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"]


def state_of(step: int, size: int = 64) -> TrainState:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "tags.Protein": torch.randn(4, size, generator=generator),
        "moments.Protein": torch.randn(4, size, generator=generator).bfloat16(),
        "rng": generator.get_state(),
    }
    return TrainState(step, tensors, {"rows_seen": step * 32, "best": float("inf"), "order": [step, 2]}, IDENTITY)


def same(one: TrainState | None, other: TrainState) -> bool:
    return (
        one is not None
        and one._replace(tensors={}) == other._replace(tensors={})
        and files.tensor_bytes(one.tensors) == files.tensor_bytes(other.tensors)
    )


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked child (importing torch anew costs seconds). Its wait status: 0, or 9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 -- a failed assertion of pytest too
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def watch_calls(hook: Callable[[str, Callable[[], Any]], Any]) -> None:
    """Routes every call of the protocol through `hook(name, call)`; each file is written as two halves."""
    real: dict[str, Any] = {name: getattr(os, name) for name in CALLS}
    before = ""

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal before
            if name == "write" and before == "open":
                file, data = args
                args = (file, data[: len(data) // 2])  # write_durably must then write the rest
            before = name
            return hook(name, lambda: real[name](*args, **options))

        return call

    for name in CALLS:
        setattr(os, name, watched(name))
    exchange = files._exchange
    files._exchange = lambda one, other: hook("exchange", lambda: exchange(one, other))


class Undo:
    """Puts `os` back after `watch_calls` in this process."""

    def __enter__(self) -> None:
        self.real = {name: getattr(os, name) for name in CALLS}
        self.exchange = files._exchange

    def __exit__(self, *_: object) -> None:
        for name, call in self.real.items():
            setattr(os, name, call)
        files._exchange = self.exchange


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def leave(folder: Path, scene: str) -> None:
    """Steps 10 and 20, and what the scene is about."""
    for step in (10, 20):
        save(folder, state_of(step), keep=2)
    if scene == "damaged step there":
        save(folder, state_of(30), keep=3)
        flip(folder / "step-00000030" / checkpoint.STATE, 3000)
    if scene == "dead save there":
        (folder / ".tmp-30-dead").mkdir()
        (folder / ".tmp-30-dead" / checkpoint.STATE).write_bytes(b"half")


SCENES = ["first two steps there", "damaged step there", "dead save there"]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
    shape=st.lists(st.integers(0, 4), max_size=3),
    step=st.integers(0, 10**9),
    best=st.floats(allow_nan=False),
    seed=st.integers(0, 2**32),
)
def test_round_trip_is_bit_exact(
    dtype: torch.dtype, shape: list[int], step: int, best: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    random_bytes = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    tensor = random_bytes.to(torch.uint8).view(dtype).squeeze(-1)
    state = TrainState(step, {"a": tensor}, {"best": best, "name": "\ud800 é"}, IDENTITY)
    path = save(folder, state, keep=2)
    loaded, skipped = load_newest(folder)
    assert same(loaded, state)
    assert (skipped, verify(path), names(folder)) == ([], [], [path.name])


def test_manifest_says_where_the_state_comes_from(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b", state_of(10), keep=2)
    manifest = json.loads((save(tmp_path / "a" / "b", state_of(20), keep=2) / checkpoint.MANIFEST).read_text())
    assert (manifest["format"], manifest["step"], manifest["parent"]) == (1, 20, 10)
    assert manifest["identity"] == IDENTITY
    assert {"python", "torch", "transformers", "deepspeed"} <= set(manifest["libraries"])
    assert set(manifest["files"]) == {checkpoint.STATE, checkpoint.PROGRESS}


def test_each_file_lasts_before_its_folder_and_the_folder_before_its_name(tmp_path: Path) -> None:
    calls: list[str] = []

    def note(name: str, call: Callable[[], Any]) -> Any:
        calls.append(name)
        return call()

    with Undo():
        (tmp_path / "run").mkdir()
        watch_calls(note)
        save(tmp_path / "run", state_of(10), keep=2)
    one_file, one_folder = ["open", "write", "write", "fsync"], ["open", "fsync"]
    assert calls == ["mkdir", *one_file * 3, *one_folder, "rename", *one_folder]


@pytest.mark.parametrize(("scene", "can_exchange"), [*((scene, True) for scene in SCENES), (SCENES[1], False)])
def test_sigkill_at_every_call_leaves_the_old_state_or_the_new(
    tmp_path: Path, scene: str, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    leave(tmp_path / "before", scene)
    outcomes = []
    for fatal in range(1, 1000):
        folder = tmp_path / f"run-{fatal}"
        shutil.copytree(tmp_path / "before", folder)

        def killed_save(folder: Path = folder, fatal: int = fatal) -> None:
            seen = 0

            def kill(name: str, call: Callable[[], Any]) -> Any:
                nonlocal seen
                seen += 1
                if seen == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call()

            watch_calls(kill)
            save(folder, state_of(30), keep=2)

        status = in_child(killed_save)
        loaded, skipped = load_newest(folder)
        assert loaded is not None
        assert same(loaded, state_of(20)) or same(loaded, state_of(30)), f"call {fatal}"
        assert all("step-00000030" in line for line in skipped)
        visible = {name: verify(folder / name) for name in names(folder) if name.startswith("step-")}
        damaged = {name for name, problems in visible.items() if problems}
        assert damaged <= ({"step-00000030"} if scene == "damaged step there" else set()), f"call {fatal}"
        assert len(visible) - len(damaged) >= 2, f"call {fatal}"
        outcomes.append(loaded.step)
        save(folder, state_of(30), keep=2)  # over the leftovers
        assert names(folder) == ["step-00000020", "step-00000030"]
        loaded, skipped = load_newest(folder)
        assert same(loaded, state_of(30))
        assert not skipped
        if status == 0:
            break
        assert status == signal.SIGKILL, f"call {fatal}"
        shutil.rmtree(folder)
    assert fatal > 20, "the sweep saw too few calls to have covered the protocol"
    assert outcomes == sorted(outcomes), "once committed, a state stays"
    assert set(outcomes) == {20, 30}


@pytest.mark.parametrize("scene", SCENES)
def test_an_os_error_at_every_call_is_save_failed_or_a_warning(tmp_path: Path, scene: str) -> None:
    leave(tmp_path / "before", scene)
    failures: list[SaveFailed] = []
    for fatal in range(1, 1000):
        folder, seen = tmp_path / f"run-{fatal}", 0
        shutil.copytree(tmp_path / "before", folder)

        def fail(name: str, call: Callable[[], Any], fatal: int = fatal) -> Any:
            nonlocal seen
            seen += 1
            if seen == fatal:
                raise OSError(errno.EIO, "Input/output error")
            return call()

        with Undo():
            watch_calls(fail)
            try:
                save(folder, state_of(30), keep=2)
            except SaveFailed as error:
                failures.append(error)
        loaded, _ = load_newest(folder)
        assert same(loaded, state_of(20)) or same(loaded, state_of(30))
        assert not [name for name in names(folder) if name.startswith(".tmp-30") and name != ".tmp-30-dead"]
        save(folder, state_of(30), keep=2)
        assert names(folder) == ["step-00000020", "step-00000030"]
        if seen < fatal:
            break
        shutil.rmtree(folder)
    assert len(failures) > 15
    for failure in failures:
        assert ": the checkpoint of step 30 was not written: " in str(failure)
        assert "Input/output error" in str(failure)
        assert f"needs {failure.bytes_needed} bytes" in str(failure)


def test_disk_full_tells_the_bytes_and_the_next_save_succeeds(tmp_path: Path) -> None:
    def work() -> None:
        leave(tmp_path, SCENES[0])
        state = state_of(30, size=4096)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(SaveFailed, match=r"File too large") as caught:
            save(tmp_path, state, keep=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert names(tmp_path) == ["step-00000010", "step-00000020"]
        assert same(load_newest(tmp_path)[0], state_of(20))
        path = save(tmp_path, state, keep=2)
        assert caught.value.bytes_needed == sum((path / name).stat().st_size for name in FILES)
        assert same(load_newest(tmp_path)[0], state)

    assert in_child(work) == 0


def test_a_folder_that_cannot_be_made_is_save_failed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveFailed, match="the checkpoint of step 10 was not written"):
        save(tmp_path / "file" / "checkpoints", state_of(10), keep=2)
    with pytest.raises(UserError, match="cannot be listed"):
        load_newest(tmp_path / "file")
    assert load_newest(tmp_path / "none") == (None, [])


def three_steps(folder: Path) -> Path:
    for step in (10, 20, 30):
        save(folder, state_of(step), keep=3)
    return folder / "step-00000030"


def test_every_flipped_bit_and_every_truncation_is_found_and_named(tmp_path: Path) -> None:
    newest, rng = three_steps(tmp_path), random.Random(0)
    for trial in range(250):
        path = newest / FILES[trial % 3]
        good = path.read_bytes()
        if trial < 200:
            flip(path, rng.randrange(len(good) * 8))
        else:
            path.write_bytes(good[: rng.randrange(len(good))])
        assert [problem.split(":")[0] for problem in verify(newest)] == [path.name]
        loaded, skipped = load_newest(tmp_path)
        assert same(loaded, state_of(20))
        assert len(skipped) == 1
        assert skipped[0].startswith(f"{newest}: skipped: {path.name}: ")
        path.write_bytes(good)
    assert same(load_newest(tmp_path)[0], state_of(30))


@pytest.mark.parametrize("name", FILES)
def test_swapped_deleted_and_extra_files_are_found_and_named(tmp_path: Path, name: str) -> None:
    newest, older = three_steps(tmp_path), tmp_path / "step-00000010"
    mine, other = (newest / name).read_bytes(), (older / name).read_bytes()
    (newest / name).write_bytes(other)
    (older / name).write_bytes(mine)
    assert [problem.split(":")[0] for problem in verify(newest)] == [name]
    assert verify(older)
    assert same(load_newest(tmp_path)[0], state_of(20))
    (older / name).write_bytes(other)
    (newest / name).unlink()
    assert [problem.split(":")[0] for problem in verify(newest)] == [name]
    assert same(load_newest(tmp_path)[0], state_of(20))
    (newest / name).write_bytes(mine)
    (newest / "extra").touch()
    assert verify(newest) == ["'extra': does not belong here"]
    (newest / "extra").unlink()
    newest.rename(tmp_path / "step-00000031")
    assert verify(tmp_path / "step-00000031") == ["manifest.json: step is 30 but the folder is step-00000031"]


def test_two_swapped_files_of_one_checkpoint_are_found(tmp_path: Path) -> None:
    newest = three_steps(tmp_path)
    for one, other in ((FILES[0], FILES[1]), (FILES[1], FILES[2]), (FILES[0], FILES[2])):
        for _ in range(2):
            (newest / one).rename(newest / "x")
            (newest / other).rename(newest / one)
            (newest / "x").rename(newest / other)
            if _ == 0:
                assert same(load_newest(tmp_path)[0], state_of(20))
    assert verify(newest) == []


def rewrite(path: Path, **changes: object) -> None:
    """Changes a manifest and seals it again, as a forger or another version of tagllm would."""
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["digest"]
    path.write_bytes(json_bytes({**manifest, "digest": digest_of(manifest)}))


@pytest.mark.parametrize("entry", [0, 2, "1", None, "x" * 10_000])
def test_another_format_version_is_refused_not_skipped(tmp_path: Path, entry: object) -> None:
    newest = three_steps(tmp_path)
    rewrite(newest / checkpoint.MANIFEST, format=entry)
    assert "this tagllm reads 1" in verify(newest)[0]
    assert len(verify(newest)[0]) < 200
    for attempt in (lambda: load_newest(tmp_path), lambda: save(tmp_path, state_of(30), keep=2)):
        with pytest.raises(UnknownFormat, match="this tagllm reads 1"):
            attempt()
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "30"},
        {"format": True},
        {"step": -1},
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "x"}}},
        {"files": {checkpoint.STATE: {"bytes": "1", "sha256": "x"}, checkpoint.PROGRESS: 3}},
        {"identity": {"data": 3}},
        {"unknown": 1},
    ],
)
def test_a_forged_manifest_is_one_problem(tmp_path: Path, changes: dict[str, object]) -> None:
    newest = three_steps(tmp_path)
    rewrite(newest / checkpoint.MANIFEST, **changes)
    assert [problem.split(":")[0] for problem in verify(newest)] == [checkpoint.MANIFEST]
    assert same(load_newest(tmp_path)[0], state_of(20))


def test_damage_that_json_does_not_see_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(10)._replace(identity={"data": "\u00e9"}), keep=2) / checkpoint.MANIFEST
    flipped = path.read_bytes().replace(b"\\u00e9", b"\\u00E9")  # one bit
    assert flipped != path.read_bytes()
    assert json.loads(flipped) == json.loads(path.read_bytes())
    path.write_bytes(flipped)
    assert verify(path.parent) == ["manifest.json: its own digest does not match"]


@pytest.mark.parametrize("data", [b"[" * 5000, b'{"a":' * 900 + b"1" + b"}" * 900, b"{}", b"null", b"\x00"])
def test_a_hostile_manifest_is_one_problem(tmp_path: Path, data: bytes) -> None:
    newest = three_steps(tmp_path)
    (newest / checkpoint.MANIFEST).write_bytes(data)
    assert [problem.split(":")[0] for problem in verify(newest)] == [checkpoint.MANIFEST]


def test_a_valid_checkpoint_of_the_same_step_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(10), keep=2)
    before = (path / checkpoint.MANIFEST).stat().st_ino
    save(tmp_path, state_of(10), keep=2)
    assert (path / checkpoint.MANIFEST).stat().st_ino == before
    flip(path / checkpoint.PROGRESS, 5)
    save(tmp_path, state_of(10), keep=2)
    assert verify(path) == []
    assert names(tmp_path) == [path.name]
    state = state_of(10)
    save(tmp_path, state._replace(progress=state.progress | {"done": True}), keep=2)
    newest, skipped = load_newest(tmp_path)
    assert newest is not None and newest.progress["done"] is True and not skipped
    assert names(tmp_path) == [path.name]
    with pytest.raises(UserError, match="data: the checkpoint of step 10 was made with ddd"):
        save(tmp_path, state_of(10)._replace(identity={**IDENTITY, "data": "e"}), keep=2)


@pytest.mark.parametrize("keep", [2, 3])
def test_prune_keeps_the_newest_valid_ones(tmp_path: Path, keep: int) -> None:
    for step in range(10, 60, 10):
        save(tmp_path, state_of(step), keep=keep)
        assert len(names(tmp_path)) == min(keep, step // 10)
    flip(tmp_path / "step-00000050" / checkpoint.STATE, 9)
    save(tmp_path, state_of(60), keep=keep)
    valid = [name for name in names(tmp_path) if not verify(tmp_path / name)]
    assert len(valid) == keep, "a damaged one does not count"
    with pytest.raises(ValueError, match="keep is 1"):
        save(tmp_path, state_of(70), keep=1)


def test_nothing_is_pruned_when_the_new_one_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, SCENES[0])
    write = files.write_durably
    monkeypatch.setattr(checkpoint, "write_durably", lambda path, data: write(path, data[:-1] + b"?"))
    with pytest.raises(SaveFailed, match=r"read back, manifest.json: it is not JSON"):
        save(tmp_path, state_of(30), keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_another_identity_is_refused_with_both_digests_and_a_way_out() -> None:
    check_identity(state_of(10), IDENTITY)
    with pytest.raises(UserError) as caught:
        check_identity(state_of(10), {**IDENTITY, "data": "e" * 64, "backbone": "f" * 64})
    backbone, data = caught.value.problems
    assert data.startswith("data: the checkpoint of step 10 was made with " + "d" * 64 + ", this run has " + "e" * 64)
    assert "Restore the old data, or give a new output folder" in data
    assert backbone.startswith("backbone: ")
