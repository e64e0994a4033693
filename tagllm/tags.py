"""Tags and the library they are kept in: names <-> rows, saving, loading, adding.

Shapes: p rows of a tag, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tagllm import __version__
from tagllm.config import HeadConfig
from tagllm.errors import UserError, did_you_mean
from tagllm.files import (
    DamagedFile,
    appearing_folder,
    json_bytes,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    write_durably,
)
from tagllm.head import Head, fields_alone, num_states
from tagllm.kernel import Kernel

FORMAT = 3
MOST_POOLS = 255
"""Means over fields that heads read side by side: a position has the number of its own in one byte."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Tag:
    """`rows_PD` in fp32; `about` says how it came to be (template, dtype, ...), for people and for predict."""

    name: str
    kind: str
    rows_PD: Tensor
    head: Head | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def with_rows(self, rows_PD: Tensor) -> Tag:
        """The same tag with other rows; with none it takes no place in a prompt."""
        return replace(self, rows_PD=rows_PD)

    @property
    def knows_answers(self) -> bool:
        """Whether it was trained on rows with their answers: a function tag, or a domain tag that was enriched."""
        if "knows_answers" in self.about:
            return bool(self.about["knows_answers"])
        has_output = re.search(r"\{\s*output\s*\}", str(self.about.get("template")))
        return self.kind == "function" or bool(self.about.get("target")) or has_output is not None

    def answers_like(self, other: Tag) -> bool:
        """With the same rows and the same head, whatever is said about them."""
        if not torch.equal(self.rows_PD, other.rows_PD) or self.head is None or other.head is None:
            return torch.equal(self.rows_PD, other.rows_PD) and self.head is other.head
        mine, its = self.head.tensors(), other.head.tensors()
        same = mine.keys() == its.keys() and all(torch.equal(mine[part], its[part]) for part in mine)
        return same and (self.head.spec, self.head.pools) == (other.head.spec, other.head.pools)


class BackboneIdentity(NamedTuple):
    """What a tag must know of the LLM it was trained for. `fingerprint` is a hash over the token embedding, `decoder`
    over its maps, `tokenizer` over what that makes of a text; empty where nobody looked."""

    name: str
    architecture: str
    hidden_size: int
    vocabulary_size: int
    fingerprint: str
    decoder: str = ""
    tokenizer: str = ""

    def require_same(self, other: BackboneIdentity, where: str) -> None:
        """Raises UserError unless `other` is the same backbone, whatever name or path it was loaded from."""
        differ = [key for key in self._fields[5:] if "" != getattr(self, key) != getattr(other, key) != ""]
        if self[1:5] == other[1:5] and not differ:
            return
        besides = f"whose {' and '.join(differ)} {'is' if len(differ) == 1 else 'are'} not the same" if differ else ""
        raise UserError(
            f"{where}: its tags were trained for {_identity(self)} but the backbone is {_identity(other)}"
            f"{', ' * bool(besides)}{besides}; tags fit only the backbone they were trained on, with its tokenizer. "
            "Load that backbone, or train the tags anew."
        )


def _identity(backbone: BackboneIdentity) -> str:
    return (
        f"{backbone.name} ({backbone.architecture}, d {backbone.hidden_size}, vocabulary "
        f"{backbone.vocabulary_size}, fingerprint {backbone.fingerprint[:12]})"
    )


@dataclass(frozen=True)
class TagLibrary:
    """Tags of one backbone. On disk a folder: library.json, tags.safetensors, README.md; never a pickle."""

    backbone: BackboneIdentity
    tags: dict[str, Tag] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, str]:
        return {name: tag.kind for name, tag in self.tags.items()}

    def add(self, tag: Tag) -> TagLibrary:
        """The library with one more tag (or a new version of it); the tensors of the others are the same objects."""
        return replace(self, tags={**self.tags, tag.name: tag})

    def get(self, name: str, where: str) -> Tag:
        if name not in self.tags:
            raise UserError(f'{where}: it holds no tag "{name}". {did_you_mean(name, self.tags)}')
        return self.tags[name]

    def save(self, folder: Path) -> None:
        """Writes the folder whole or not at all; an older library of the same name is replaced."""
        with appearing_folder(folder) as unfinished:
            self._write(unfinished)

    def _write(self, folder: Path) -> None:
        tensors = {}
        for tag in self.tags.values():
            tensors[f"{tag.name}.rows"] = tag.rows_PD.float().contiguous()
            if tag.head is not None:
                for part, tensor in tag.head.tensors().items():
                    exact = tensor.float() if tensor.is_floating_point() else tensor
                    tensors[f"{tag.name}.head.{part}"] = exact.contiguous()
        save_tensors(folder / "tags.safetensors", tensors)
        document = {
            "format": FORMAT,
            "tagllm": __version__,
            "backbone": self.backbone._asdict(),
            "sha256": {"tags.safetensors": sha256_file(folder / "tags.safetensors")},
            "tags": {name: _describe(tag) for name, tag in self.tags.items()},
        }
        write_durably(folder / "library.json", json_bytes(document))
        write_durably(folder / "README.md", self.card().encode())

    @classmethod
    def load(cls, folder: Path, backbone: BackboneIdentity | None = None) -> TagLibrary:
        """Reads and checks a library.

        Raises:
            UserError: not a library, a damaged file, a shape or sha256 that differs, or another backbone.
        """
        if not (folder / "library.json").is_file():
            raise UserError(f"{folder}: not a tag library (no library.json). A run keeps its own in RUN/library.")
        try:
            return cls._read(folder, backbone)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(folder / "library.json", f"not a tag library: {error!r}") from None

    @classmethod
    def load_all(cls, folders: Sequence[Path]) -> TagLibrary:
        """The tags of several libraries of one backbone together.

        Raises:
            UserError: as `load`, and where a name stands for other rows in two of them.
        """
        library = cls.load(folders[0])
        for folder in folders[1:]:
            for name, tag in cls.load(folder, library.backbone).tags.items():
                if name in library.tags and not library.tags[name].answers_like(tag):
                    raise UserError(
                        f"{folder}: <{name}> differs from the one of the same name in {folders[0]}. Leave one of the "
                        "libraries out."
                    )
                library = library.add(tag)
        return library

    @classmethod
    def _read(cls, folder: Path, backbone: BackboneIdentity | None) -> TagLibrary:
        document = read_json(folder / "library.json")
        if document["format"] != FORMAT:
            later = document["format"] > FORMAT
            raise UserError(
                f"{folder}/library.json: format is {document['format']}; this version reads format {FORMAT}. "
                f"{'Update tagllm.' if later else 'Train the tags anew, or read them with the tagllm that wrote them.'}"
            )
        file = folder / "tags.safetensors"
        try:
            expected, found = document["sha256"][file.name], sha256_file(file)
        except OSError as error:
            raise DamagedFile(file, error.strerror or error) from None
        if expected != found:
            raise DamagedFile(file, f"sha256 is {found[:12]}, library.json says {expected[:12]}")
        identity = BackboneIdentity(**document["backbone"])
        if identity.hidden_size < 1:
            raise ValueError(f"hidden_size is {identity.hidden_size}")
        if backbone is not None:
            identity.require_same(backbone, str(folder))
        tensors = load_tensors(file)
        described = document["tags"]
        tags = {name: _rebuild(folder, name, described[name], tensors, identity) for name in described}
        return cls(identity, tags)

    def card(self) -> str:
        """A README for people who find the folder."""
        lines = [
            "# Tag library",
            "",
            f"Input tags for `{self.backbone.name}` ({self.backbone.architecture}, d {self.backbone.hidden_size}).",
            "They stand in a prompt like words; the backbone stays as it is. Made with tagllm (Tag-LLM, ICML 2024).",
            "",
            "| tag | kind | rows | head | template |",
            "|---|---|---|---|---|",
        ]
        for tag in self.tags.values():
            head = f"{tag.head.spec.type}, {tag.head.spec.outputs}" if tag.head else ""
            head += "; answers from the fields alone" if fields_alone({tag.name: tag.head}) else ""
            template = str(tag.about.get("template", "")).replace("|", "\\|")
            lines.append(f"| `<{tag.name}>` | {tag.kind} | {len(tag.rows_PD)} | {head} | `{template}` |")
        return "\n".join(lines) + "\n"


def _describe(tag: Tag) -> dict[str, Any]:
    head = tag.head.spec.model_dump(mode="json") if tag.head else None
    pools = {"pools": tag.head.pools} if tag.head else {}
    return {"kind": tag.kind, "length": len(tag.rows_PD), "head": head, **pools, "about": tag.about}


def _rebuild(
    folder: Path, name: str, described: dict[str, Any], tensors: dict[str, Tensor], backbone: BackboneIdentity
) -> Tag:
    if not NAME.fullmatch(name) or described["kind"] not in ("domain", "function"):
        raise ValueError(f"tag {name!r} of kind {described['kind']!r}")
    stored = _Stored(folder / "tags.safetensors", name, tensors, backbone.hidden_size)
    rows_PD = stored.tensor("rows", described["length"], backbone.hidden_size)
    head = None
    if described["head"] is not None:
        if unknown := [key for key in described["head"] if key not in HeadConfig.model_fields]:
            raise UserError(
                f"{folder}/library.json: the head of <{name}> has {', '.join(unknown)}, which this version "
                f"({__version__}) does not know; a later one wrote it. Update tagllm."
            )
        head = stored.head(HeadConfig(**described["head"]), _pools(described["pools"]))
    return Tag(name, described["kind"], rows_PD, head, dict(described["about"]))


class _Stored(NamedTuple):
    """What a file has of one tag. Its methods raise DamagedFile where it is not what they want."""

    file: Path
    name: str
    tensors: dict[str, Tensor]
    hidden_size: int

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors

    def tensor(self, part: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        found = self.tensors.get(f"{self.name}.{part}")
        if found is None or tuple(found.shape) != shape or found.dtype != dtype:
            actual = "missing" if found is None else _shown(tuple(found.shape), found.dtype)
            raise DamagedFile(self.file, f"{self.name}.{part} is {actual}; it must be {_shown(shape, dtype)}")
        if not found.isfinite().all():
            raise DamagedFile(self.file, f"{self.name}.{part} holds numbers that are not finite")
        return found

    def head(self, spec: HeadConfig, pools: tuple[int, ...]) -> Head:
        outputs, states = spec.outputs, num_states(spec, len(pools))
        return Head(
            spec,
            self.tensor("head.weight", outputs, states * self.hidden_size),
            self.tensor("head.bias", outputs),
            self.tensor("head.mean", outputs),
            self.tensor("head.std", outputs),
            self.kernel(outputs, states) if self.has("head.landmarks") else None,
            pools,
            self.tensor("head.noise", outputs) if self.has("head.noise") else None,
        )

    def kernel(self, outputs: int, states: int) -> Kernel:
        size, number = self.hidden_size, self.tensors[f"{self.name}.head.landmarks"].numel()
        state_TD = self.tensor("head.states", len(self.tensors[f"{self.name}.head.states"]), size)
        at_SM = self.tensor("head.landmarks", states, number // states, dtype=torch.int64)
        if not ((at_SM >= 0) & (at_SM < len(state_TD))).all():
            told = f"has states that are not among the {len(state_TD)} kept"
            raise DamagedFile(self.file, f"{self.name}.head.landmarks {told}")
        weight_KM = self.tensor("head.kernel_weight", outputs, at_SM.shape[1])
        return Kernel(state_TD, at_SM, self.tensor("head.width", states, size), weight_KM)


def _shown(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}"


def _pools(held: list[int]) -> tuple[int, ...]:
    """Of library.json."""
    if not 1 <= len(held) <= MOST_POOLS:
        raise ValueError(f"{len(held)} means over fields; there are 1 to {MOST_POOLS}")
    return tuple(map(int, held))
