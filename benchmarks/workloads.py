"""The workloads: which rows make which step, decided here once, so that all contestants see the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.models import Settings
from tagllm.build import initial_rows, new_tag
from tagllm.config import RunConfig
from tagllm.config_file import parse_as
from tagllm.data.batch import in_chunks
from tagllm.data.dataset import Prompts, tokenise
from tagllm.data.encode import Example
from tagllm.data.examples import Examples
from tagllm.data.layout import TagLayout
from tagllm.data.sampler import Sampler
from tagllm.files import cache_folder
from tagllm.model.backbone import Backbone
from tagllm.stage import Stage, read_stage
from tagllm.tags import Tag, TagLibrary

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TAG_ROWS = 10
ROWS_PER_GROUP = 8
IGNORED = -100


class Text(NamedTuple):
    """A row as a language-modelling library wants it: labels are ids where supervised, else IGNORED."""

    ids: list[int]
    labels: list[int]


class Row(NamedTuple):
    """One row for everybody. `inline` has the tags where the template puts them and, where there is a head, the number
    as digits behind them; `plain` is the same without tags, for methods that cannot place any."""

    example: Example
    inline: Text
    plain: Text


Step = list[Row]


class Workload(NamedTuple):
    name: str
    description: str
    stage: Stage
    layout: TagLayout
    tags: dict[str, Tag]
    steps: list[Step]

    @property
    def rows_per_step(self) -> int:
        return len(self.steps[0])

    @property
    def num_learned_rows(self) -> int:
        return sum(self.layout.lengths[name] for name in self.layout.learned)

    def chunk(self, size: int) -> Step:
        """A micro-batch from the middle of the first step, as it is cut when rows are ordered by length and group."""
        start = (self.rows_per_step - size) // 2 // size * size
        return [self.steps[0][i] for i in _ordered(self.steps[0])[start : start + size]]


def available() -> list[str]:
    """All workloads whose rows are on this machine."""
    return [name for name in WORKLOADS if name != "davis" or _davis().is_file()]


def build_workload(name: str, settings: Settings, backbone: Backbone, scratch: Path, num_steps: int = 1) -> Workload:
    """Rows through tagllm's own `prepare`, cut into steps. `scratch` takes the library of frozen domain tags."""
    config = _config(name, settings, backbone, scratch)
    stage = read_stage(parse_as(RunConfig, config, name), name)
    layout = stage.layout(backbone.vocabulary_size)
    prompts = Prompts(layout, backbone.tokenizer, 240 if settings.quick else backbone.max_tokens)
    data = tokenise(stage.config.data, stage.templates, prompts, cache_folder(), ("train",))
    tags = stage.loaded | {n: new_tag(stage, n, backbone, data) for n in stage.learned}
    choose = _grouped_steps if stage.config.data.sources[0].group_by else _steps
    chosen = choose(data.splits["train"][0], 8 if settings.quick else 32, num_steps)
    steps = [[_row(example, stage, layout, backbone.tokenizer) for example in step] for step in chosen]
    return Workload(name, _describe(config, steps), stage, layout, tags, steps)


def _steps(examples: Examples, rows_per_step: int, num_steps: int) -> list[list[Example]]:
    """The first steps of an epoch, as training draws them."""
    sampler = Sampler([len(examples)], None, rows_per_step, seed=0)
    return [[examples[draw.row] for draw in sampler.step(step)] for step in range(num_steps)]


def _grouped_steps(examples: Examples, rows_per_step: int, num_steps: int) -> list[list[Example]]:
    """Whole groups of ROWS_PER_GROUP; which ones is drawn, not chosen by length."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(examples.groups_n.tolist()):
        members.setdefault(group, []).append(row)
    per_group = min(ROWS_PER_GROUP, rows_per_step // 2)
    full = [rows[:per_group] for rows in members.values() if len(rows) >= per_group]
    order = np.random.default_rng(0).permutation(len(full))
    rows = [row for i in order for row in full[i]]
    if len(rows) < num_steps * rows_per_step:
        raise SystemExit(f"only {len(full)} groups have {per_group} rows; {num_steps} steps need more.")
    return [[examples[row] for row in rows[s * rows_per_step : (s + 1) * rows_per_step]] for s in range(num_steps)]


def _row(example: Example, stage: Stage, layout: TagLayout, tokenizer: Any) -> Row:
    ids = example.ids.tolist()
    labels = [i if mark in stage.terms else IGNORED for i, mark in zip(ids, example.marks.tolist(), strict=True)]
    if len(example.target):
        digits = tokenizer(f" {float(example.target[0]):.2f}", add_special_tokens=False).input_ids
        answer = [*digits, tokenizer.eos_token_id]
        ids, labels = ids + answer, labels + answer
    words = [at for at, i in enumerate(ids) if i < layout.vocabulary_size]
    return Row(example, Text(ids, labels), Text([ids[at] for at in words], [labels[at] for at in words]))


def _ordered(rows: Sequence[Row]) -> list[int]:
    return [i for chunk in in_chunks([row.example for row in rows], len(rows)) for i in chunk]


def _describe(config: dict[str, Any], steps: Sequence[Step]) -> str:
    source = config["data"]["sources"][0]
    lengths = [len(row.example.ids) for step in steps for row in step]
    fields = ", ".join(f"{name} {json.dumps(value)}" for name, value in source.get("fields", {}).items())
    return (
        f"{len(steps)} x {len(steps[0])} rows, {np.mean(lengths):.0f} tokens each with tags ({min(lengths)}-"
        f"{max(lengths)}), from {source.get('recipe') or Path(source['path']).name}: {source['template']!r}"
        + (f"; {fields}" if fields else "")
        + (
            f"; {min(ROWS_PER_GROUP, len(steps[0]) // 2)} rows per {source['group_by'][0]}"
            if "group_by" in source
            else ""
        )
    )


# What is measured. The tags have the paper's ten rows; domain tags of stage 3 are frozen (random: speed does not care).

_LEARNED_DOMAIN = {"kind": "domain", "length": TAG_ROWS}
_LEARNED_FUNCTION = {"kind": "function", "length": TAG_ROWS}
_LEARNED_HEAD = {**_LEARNED_FUNCTION, "head": {"type": "regression", "reads": "last"}}
ALIKE = {"davis": "affinity"}
"""Rows of the same shape: neither tuned for nor weighed again in a run that has measured the other."""


def _config(name: str, settings: Settings, backbone: Backbone, scratch: Path) -> dict[str, Any]:
    tags, source = WORKLOADS[name](settings)
    for tag, value in tags.items():
        if value is None:
            tags[tag] = {"load": str(_frozen_domains(backbone, scratch))}
    source = {"rows": {"train": 400 if settings.quick else 3000}, **source}
    return {
        "output": "unused", "backbone": {"model": settings.model}, "tags": tags, "data": {"sources": [source]},
        "optim": {"steps": 1},
    }  # fmt: skip


def _smiles(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"SMILES": dict(_LEARNED_DOMAIN)}, {
        "recipe": "rdkit-nci",
        "template": "The SMILES of the molecule is <SMILES> {smiles}",
        "max_characters": {"smiles": 60},
    }


def _qed(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"QED": dict(_LEARNED_HEAD)}, {
        "recipe": "rdkit-nci",
        "template": "The SMILES of the molecule is {smiles}. Its drug-likeness is <QED>",
        "target": "qed",
        "max_characters": {"smiles": 60},
    }


_AFFINITY = "The protein is <Protein> {sequence}. The drug is <SMILES> {smiles}. The affinity is <BindingAffinity>"


def _affinity(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"Protein": None, "SMILES": None, "BindingAffinity": dict(_LEARNED_HEAD)}, {
        "recipe": "pydta",
        "template": _AFFINITY,
        "target": "affinity",
        "fields": {"sequence": {"characters": "spaced", "max_tokens": settings.protein_tokens}},
        "max_characters": {"smiles": 80},
        "group_by": ["sequence"],
    }


def _davis_rows(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    tags, source = _affinity(settings)
    del source["recipe"]
    own = {"path": str(_davis()), "target": "pKd", "split": {"by": ["drug_id", "target_id"]}}
    return tags, {**source, **own}


def _translation(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Real sentences where they are; else what every machine has: a molecule's SMILES into rdkit's canonical one."""
    path = SHARED / "translation" / "libreoffice_help.train.tsv.gz"
    longest = 60 if settings.quick else 160
    if path.is_file():
        source: dict[str, Any] = {
            "path": str(path),
            "template": "German: {de} English: <Translate> {output}",
            "output": "en",
            "max_characters": {"en": longest, "de": longest},
            "split": {"by": ["en"]},
        }
    else:
        source = {
            "recipe": "rdkit-nci",
            "template": "SMILES: {smiles} Canonical SMILES: <Translate> {output}",
            "output": "key",
            "max_characters": {"smiles": 60},
        }
    return {"Translate": dict(_LEARNED_FUNCTION)}, source


def _davis() -> Path:
    return SHARED / "affinity" / "davis.train.csv.gz"


def _frozen_domains(backbone: Backbone, scratch: Path) -> Path:
    """A library with the domain tags of stage 3, as stage 1 would leave it."""
    folder = scratch / "domains"
    if not folder.exists():
        embedding_VD = backbone.model.get_input_embeddings().weight.detach().cpu()
        library = TagLibrary(backbone.identity)
        for seed, name in enumerate(("Protein", "SMILES")):
            library = library.add(Tag(name, "domain", initial_rows("mean", TAG_ROWS, embedding_VD, [], seed)))
        library.save(folder)
    return folder


WORKLOADS: dict[str, Callable[[Settings], tuple[dict[str, Any], dict[str, Any]]]] = {
    "smiles": _smiles,
    "qed": _qed,
    "affinity": _affinity,
    "davis": _davis_rows,
    "translation": _translation,
}
"""Tags (None: loaded and frozen) and the source of rows, as in a config."""
