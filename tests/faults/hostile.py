"""Fault 14: hostile files. Only our typed errors, little memory, no file outside the folder, no code run.

Each input is a sound file that was changed at random, or a known trick; JSON is sealed again half of the time, so that
what lies behind the checksums is reached. Everything runs in one process under an audit hook.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tagllm.config import digest_of
from tagllm.config_file import load_config
from tagllm.data.readers import read_rows
from tagllm.errors import UserError
from tagllm.files import json_bytes, sha256_file, tensor_bytes
from tagllm.tags import BackboneIdentity, Tag, TagLibrary
from tagllm.template import parse_template
from tagllm.train import checkpoint
from tests.faults.record import Record

FAULT, MEMORY_LIMIT = "14 hostile files", 512 << 20
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
    "socket.bind", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen", "shutil.unpack_archive",
)  # fmt: skip
_WORDS = [
    b"\x00", b"..", b"../../etc/passwd", b"/etc/passwd", b"NaN", b"1e999", b"-1", b"9223372036854775808", b"null", b"{",
    b"[" * 500, b"}", b'"', b"'", b"\n", b",", b"=HYPERLINK(1)", b"@SUM(1)", b"\xff\xfe",
    b"!!python/object/apply:os.system",
    b"&a [*a, *a]", b"${oc.env:HOME}", b"${output}", b"<", b">", b"<<", b"{{", b"\r", b"\t", b"\xe2\x80\xae", b"1_000",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**63, 2**200, 1e308, float("nan"), float("inf"), "", "..", "../../x", "/etc/passwd", "\x00",
    "x" * 5000, [], {}, [[]], {"a": {}}, "float32", "\ud800",
]  # fmt: skip
CONFIG = """\
output: run
backbone: {model: smollm2, dtype: fp32}
tags:
  SMILES: {length: 2}
  Size: {kind: function, length: 3, head: {reads: both}}
data:
  sources:
    - {path: rows.csv, target: size, template: "The molecule is <SMILES> {smiles}. Its size is <Size>"}
optim: {steps: 4, rows_per_step: 8, rows_per_micro_batch: 2, tag_lr: 1.0e-3}
"""
_TRICKS = [
    "output: !!python/object/apply:os.system ['touch PWNED']\n", "output: !!python/name:os.system\n",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "output: ${oc.env:HOME}\n", "? [a]\n: b\n", "- 1\n",
    "output: *x\n",
    "&a [*a]\n", "{" * 2000, "[" * 2000, "a: " * 500, "output: !!binary x\n", "\x00", "output: ${output}\n", "\ufeff",
]  # fmt: skip


class Watch:
    """Sees what the process does; there is no way to take an audit hook off again, so it can be told to look away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.looking, self.seen = str(folder), False, list[str]()
        libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "/usr/share/zoneinfo"}
        self._allowed = (self.folder, *libraries, *map(os.path.realpath, libraries))
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.looking:
            return
        if event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(
                os.fsdecode(arguments[0])
            )  # a link in the folder may lead out of it, as in hub caches
            if not path.startswith(self._allowed):
                self.seen.append(f"opened {path}")


def changed(data: bytes, chooser: random.Random) -> bytes:
    """A few random edits: bits, cuts, copies, words."""
    made = bytearray(data)
    for _ in range(chooser.choice([1, 1, 1, 2, 4, 16])):
        at, end = sorted(chooser.randrange(len(made) + 1) for _ in range(2))
        kind = chooser.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            del made[at : min(end, at + 40)]
        elif kind == 2:
            made[at:at] = made[at : min(end, at + 200)]
        elif kind == 3:
            del made[at:]
        else:
            made[at:at] = chooser.choice(_WORDS)
    return bytes(made)


def changed_json(value: Any, chooser: random.Random) -> Any:
    """The same document with one value (or key) replaced, somewhere."""
    if isinstance(value, dict) and value and chooser.random() < 0.9:
        key = chooser.choice(list(value))
        if chooser.random() < 0.1:
            return {(str(chooser.choice(_VALUES)) if k == key else k): v for k, v in value.items()}
        if chooser.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed_json(value[key], chooser)}
    return chooser.choice(_VALUES)


class Target:
    """A folder with a sound thing in it, how it is read, and how it is spoiled."""

    def __init__(self, folder: Path, read: Callable[[Path], object]) -> None:
        self.folder, self.read = folder, read
        self.sound = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def spoil(self, chooser: random.Random) -> None:
        shutil.rmtree(self.folder)
        for name, data in self.sound.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)
        name = chooser.choice(sorted(self.sound))
        path, data = self.folder / name, self.sound[name]
        trick = chooser.random()
        if path.suffix == ".json" and trick < 0.6:
            document = changed_json(json.loads(data), chooser)
            if isinstance(document, dict) and "digest" in document and chooser.random() < 0.8:
                rest = {k: v for k, v in document.items() if k != "digest"}
                document = {**rest, "digest": digest_of(rest)}
            path.write_bytes(json_bytes(document))
        elif path.suffix == ".safetensors" and trick < 0.3:
            path.write_bytes(_hostile_tensors(data, chooser))
        elif trick < 0.63:
            path.unlink()
            path.symlink_to(chooser.choice(["/etc/hostname", "/dev/null", self.folder, "nowhere"]))
        elif trick < 0.66 and path.suffix == ".yaml":
            path.write_text(chooser.choice(_TRICKS), encoding="utf-8")
        else:
            path.write_bytes(changed(data, chooser))
        self._seal(chooser)

    def _seal(self, chooser: random.Random) -> None:
        """A library whose sha256 is right again."""
        library, tensors = self.folder / "library.json", self.folder / "tags.safetensors"
        if library.is_file() and tensors.is_file() and chooser.random() < 0.7:
            try:
                document = json.loads(library.read_bytes())
                document["sha256"]["tags.safetensors"] = sha256_file(tensors)
            except (ValueError, TypeError, KeyError):
                return
            library.write_bytes(json_bytes(document))


def _hostile_tensors(data: bytes, chooser: random.Random) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    kind = chooser.randrange(5)
    if kind == 0:
        return pickle.dumps({"Protein.rows": os.system})
    if kind == 1:
        return struct.pack("<Q", 2 ** chooser.randrange(30, 64)) + data[8:]
    if kind == 2:
        rows = torch.full((2, 8), chooser.choice([float("nan"), float("inf")]))
        return tensor_bytes({"Protein.rows": rows, "Size.rows": torch.zeros(3, 8)})
    if kind == 3:
        return gzip.compress(data)
    head = json.dumps(changed_json(header, chooser)).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


def targets(folder: Path) -> dict[str, Target]:
    """A library, a checkpoint, a config, and a table."""
    identity = BackboneIdentity("tiny", "llama", 8, 96, "f" * 64)
    library = TagLibrary(identity).add(Tag("Protein", "domain", torch.randn(2, 8)))
    library.add(Tag("Size", "function", torch.randn(3, 8))).save(folder / "library")
    state = checkpoint.TrainState(10, {"tags": torch.randn(4, 8)}, {"best": 1.5, "done": False}, {"config": "c" * 64})
    checkpoint.save(folder / "checkpoints", state, keep=2)
    for name, text in (
        ("config/run.yaml", CONFIG),
        ("table/rows.csv", "smiles,size,name\n" + 'CCO,3,"a, b"\nCN,2,c\n' * 20),
    ):
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return {
        "library": Target(folder / "library", TagLibrary.load),
        "checkpoint": Target(folder / "checkpoints", checkpoint.load_newest),
        "config": Target(folder / "config", _read_config),
        "table": Target(folder / "table", lambda path: sum(1 for _ in read_rows(path / "rows.csv"))),
    }


def _read_config(folder: Path) -> None:
    config = load_config(folder / "run.yaml")
    for source in config.data.sources:
        parse_template(source.template, {name: tag.kind or "domain" for name, tag in config.tags.items()})


def hostile(number: int, seed: int) -> Record:
    """`number` spoiled inputs, dealt to the targets in turn; each is made anew from `(seed, its number)`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, watch, told = targets(folder), Watch(folder), list[str]()
        for target in made.values():
            target.read(target.folder)  # imports what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        names = list(made)
        for at in range(number):
            kind = names[at % len(names)]
            target, chooser = made[kind], random.Random(f"{seed}-{at}")
            target.spoil(chooser)
            watch.looking = True
            try:
                with warnings.catch_warnings(action="ignore"):
                    target.read(target.folder)
            except UserError:
                pass
            except BaseException as error:  # noqa: BLE001  what we are looking for
                told.append(f"{kind} {seed}-{at}: {type(error).__name__}: {error!s:.200}")
            finally:
                watch.looking = False
        told += huge_cell(folder)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        told += [f"memory grew by {grown >> 20} MiB"] if grown > MEMORY_LIMIT else []
        told += [f"PWNED: {path}" for path in Path.cwd().glob("PWNED")]
        return Record(FAULT, number, [*told, *dict.fromkeys(watch.seen)])


def huge_cell(folder: Path) -> list[str]:
    """A cell of 10 MB and one more character: the row is refused, the others are read."""
    path = folder / "huge.csv"
    path.write_text("smiles,size\nC,1\n" + "C" * 10_000_001 + ",2\nN,3\n")
    try:
        rows = list(read_rows(path))
    except UserError:
        return []
    return [] if len(rows) <= 3 else [f"a huge cell gave {len(rows)} rows"]
