"""`tagllm predict`: a file in, the same rows with predictions in new columns out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tagllm.build import open_backbone, require_same_everywhere
from tagllm.config import (
    BackboneConfig,
    EngineConfig,
    EvaluationConfig,
    FieldConfig,
    HeadConfig,
    OptimConfig,
    SourceConfig,
)
from tagllm.data.collate import Collator
from tagllm.data.encode import Encoder, Example, TagLayout, Unusable
from tagllm.data.readers import BadRow, Row, column_names, read_rows
from tagllm.data.writers import open_writer, writable_kind
from tagllm.errors import UserError, did_you_mean
from tagllm.evaluate.generate import generate
from tagllm.field_order import order_problems, trained_with
from tagllm.files import sha256_file
from tagllm.head import pools_known
from tagllm.model.backbone import as_trained
from tagllm.model.tagged import TaggedModel
from tagllm.ranks import Ranks
from tagllm.tags import Tag, TagLibrary
from tagllm.template import Template, all_pools, parse_template, pool_of
from tagllm.train.engine import gather_on_use, sharding

CHUNK_ROWS = 1024
ERROR = "tagllm_error"


class Request(NamedTuple):
    """What is to be predicted. `tag` may be left out where there is one function tag; the backbone is the library's
    own, `template` and `max_new_tokens` come from the function tag, unless given."""

    libraries: list[Path]
    backbone: BackboneConfig | None = None
    tag: str | None = None
    template: str | None = None
    rows_per_batch: int = 32
    max_new_tokens: int | None = None


class Predicted(NamedTuple):
    """How many rows were read, have no prediction, and were cut to fit."""

    rows: int
    failed: int
    cut: int


class Predictor:
    """A model, a prompt, and the names of the columns it answers in. On several ranks each holds a part of the backbone
    and all must ask the same rows."""

    def __init__(self, request: Request, ranks: Ranks | None = None) -> None:
        library = TagLibrary.load_all(request.libraries)
        tags, identity = library.tags, library.backbone
        self.tag = _function_tag(tags, request)
        about = tags[self.tag].about
        text = request.template or about.get("template")
        if not text:
            raise UserError(f"tags.{self.tag}: it was saved without a template. Give one with --template.")
        kinds = library.kinds
        self.template: Template = parse_template(str(text), kinds, "template")
        used = {n: tag for n, tag in tags.items() if n in self.template.tags}
        if self.tag not in used:
            raise UserError(f"template: it has no <{self.tag}>. Add it, or choose another tag with --tag.")
        config = as_trained(request.backbone or BackboneConfig(model=identity.name), [tags[self.tag]])
        self.ranks = ranks or Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        sharded = (OptimConfig(steps=1), EngineConfig(zero_stage=3), self.ranks)
        backbone = open_backbone(config, self.ranks, sharding(*sharded) if self.ranks.size > 1 else None)
        identity.require_same(backbone.identity, str(request.libraries[0]))
        heads = {n: tag.head.spec for n, tag in used.items() if tag.head}
        self.spec: HeadConfig | None = heads.get(self.tag)
        if self.spec and len(heads) > 1:
            raise UserError(
                f"template: {', '.join(f'<{name}>' for name in heads)} all have heads; one per template can answer. "
                f"Take out all but <{self.tag}>."
            )
        lengths = {n: len(tag.rows_PD) for n, tag in used.items()}
        pools = all_pools([self.template], kinds, pool_of(heads.values()), pools_known(t.head for t in used.values()))
        layout = TagLayout.of(backbone.vocabulary_size, {n: kinds[n] for n in used}, lengths, [], heads, pools)
        self.model = TaggedModel(backbone.model, used, layout, reads_tokens=False, attention=backbone.attention)
        self.model.to(self.ranks.device)
        if self.ranks.size > 1:
            gather_on_use(self.model, *sharded)
        if self.spec and self.spec.reads != "last":
            prompts = trained_with(tags[self.tag], kinds) | {"template": self.template}
            if problems := order_problems(self.tag, prompts, kinds, pool_of(heads.values())):
                raise UserError(*problems)
        self.tokenizer, self.rows_per_batch = backbone.tokenizer, request.rows_per_batch
        # older tags do not say how long their answers were
        self.max_new_tokens = request.max_new_tokens or about.get("max_new_tokens", EvaluationConfig().max_new_tokens)
        self.beams, self.num_cut = about.get("beams", 1), 0
        fields = {n: field for tag in used.values() for n, field in tag.about.get("fields", {}).items()}
        fields = _renamed(fields | about.get("fields", {}), about.get("template"), self.template, kinds)
        source = SourceConfig(path="-", template=str(text), fields=fields)
        room = backbone.max_tokens - (0 if self.spec else self.max_new_tokens)
        limit = min(about.get("max_tokens") or room, room)
        self.encoder = Encoder(self.template, source, layout, backbone.tokenizer, limit, labelled=False)
        width = max([spec.outputs for spec in heads.values()], default=0)
        block = about.get("mask") == "block"
        num_pools = layout.num_pools
        self.collate = Collator(
            layout.first_learned_id, (), width, cut_at_function=True, block=block, num_pools=num_pools
        )

    @property
    def columns(self) -> list[str]:
        """Names of the new columns."""
        if self.spec is None:
            return [self.tag]
        if self.spec.classes:
            return [self.tag, *(f"{self.tag}_probability_{name}" for name in self.spec.classes)]
        return [self.tag] if self.spec.outputs == 1 else [f"{self.tag}_{k + 1}" for k in range(self.spec.outputs)]

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[list[Any] | str]:
        """The values of the new columns for each row, or why it has none."""
        encoded = self.encoder.encode(rows)
        answers: list[list[Any] | str] = [e.reason if isinstance(e, Unusable) else "" for e in encoded]
        usable = [(i, e) for i, e in enumerate(encoded) if isinstance(e, Example)]
        usable.sort(key=lambda pair: len(pair[1].ids))
        self.num_cut += sum(example.tokens_cut > 0 for _, example in usable)
        chunks = [usable[at : at + self.rows_per_batch] for at in range(0, len(usable), self.rows_per_batch)]
        found = self._answer_all([[e for _, e in chunk] for chunk in chunks])
        for (i, _), answer in zip(itertools.chain(*chunks), itertools.chain(*found), strict=True):
            answers[i] = answer
        return answers

    def _answer_all(self, chunks: list[list[Example]]) -> list[list[list[Any]]]:
        """Of heads every rank answers chunks of its own, and equally many, since all gather each module together; texts
        take as many passes as they are long, so that all write the same ones."""
        rank, size = self.ranks.rank, self.ranks.size
        if size == 1 or self.spec is None:
            return [self._answer(chunk) for chunk in chunks]
        mine = [self._answer(chunks[min(at, len(chunks) - 1)]) for at in range(rank, len(chunks) + rank, size)]
        found = self.ranks.gather(mine)
        return [found[at % size][at // size] for at in range(len(chunks))]

    @torch.no_grad()
    def _answer(self, examples: list[Example]) -> list[list[Any]]:
        if self.spec is None:
            prompts = [example.ids for example in examples]
            texts = generate(self.model, self.tokenizer, prompts, self.max_new_tokens, self.beams, self.rows_per_batch)
            return [[text] for text in texts]
        batch = self.collate(examples).to(self.ranks.device)
        values_BK = self.model(batch).values_BK[:, : self.spec.outputs].float().cpu()
        if self.spec.classes:
            of_classes = values_BK.softmax(dim=1).tolist()
            return [[self.spec.classes[int(np.argmax(each))], *each] for each in of_classes]
        return [[float(value) for value in row] for row in values_BK]


def predict_file(request: Request, source: Path, output: Path) -> Predicted:
    """Reads `source`, writes `output`; under a launcher rank 0 does.

    Every input row has one output row, in the same order, with its columns untouched, the prediction in new columns,
    and in `tagllm_error` the reason where there is none.

    Raises:
        UserError: unreadable input, a quote that is not closed, a missing or clashing column, unknown tag, damaged
            library, other backbone.
    """
    writable_kind(output)
    if output.resolve() == source.resolve():
        raise UserError(f"{output}: is the input file; input is never overwritten. Name another output.")
    columns = column_names(source)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    predictor = Predictor(request, Ranks.start(EngineConfig().timeout_s) if several else None)
    if several:
        require_same_everywhere(predictor.ranks.gather({str(source): sha256_file(source)}))
    new = [*predictor.columns, ERROR]
    missing = [name for name in predictor.template.fields if name not in columns]
    if missing:
        raise UserError(
            *(
                f"{source}: there is no column {n!r}, which the template needs. {did_you_mean(n, columns)}"
                for n in missing
            )
        )
    _refuse_clash(str(source), columns, new)
    total = failed = 0
    with open_writer(output, [*columns, *new]) if predictor.ranks.rank == 0 else nullcontext() as writer:
        for chunk in _chunks(read_rows(source)):
            readable = [row.values for row in chunk if isinstance(row, Row)]
            answers = iter(predictor.predict(readable))
            for row in chunk:
                if isinstance(row, BadRow) and row.num_lines > 1:
                    raise UserError(
                        f"{source}, line {row.line}: {row.reason}; a quote that is not closed takes the rows behind it "
                        "with it. Close it, or double it where it is meant."
                    )
                answer = f"line {row.line}: {row.reason}" if isinstance(row, BadRow) else next(answers)
                values = dict.fromkeys(columns) | (row.values or {}) if isinstance(row, BadRow) else row.values
                _refuse_clash(f"{source}, line {row.line}", values, new)  # objects may have columns of their own
                good = isinstance(answer, list)
                predicted = answer if isinstance(answer, list) else [None] * len(predictor.columns)
                if writer:
                    writer.write({**values, **dict(zip(new, [*predicted, "" if good else answer], strict=True))})
                total, failed = total + 1, failed + (not good)
    return Predicted(total, failed, predictor.num_cut)


def _renamed(
    fields: dict[str, Any], trained: str | None, asked: Template, kinds: Mapping[str, str]
) -> dict[str, FieldConfig]:
    """Settings go with the column; where the template names another one, with its place among the fields.

    Raises:
        UserError: a column with settings is not asked for, and other columns are more or fewer.
    """
    before = parse_template(trained, kinds, "template").fields if trained else []
    moved = dict(zip(before, asked.fields, strict=False))
    for name in [name for name in fields if name in before and name not in asked.fields]:
        if len(before) != len(asked.fields) or moved[name] in before:
            raise UserError(
                f"template: it has no {{{name}}}, which the tag was trained with as {fields[name]}, and which of its "
                f"fields {', '.join(asked.fields) or 'none'} is in that place cannot be told. Name the column {name}."
            )
        fields = fields | {moved[name]: fields[name]}
    return fields


def _refuse_clash(where: str, columns: Collection[str], new: Sequence[str]) -> None:
    if clash := [name for name in new if name in columns]:
        raise UserError(f"{where}: has a column {clash[0]!r} already, and inputs are never overwritten. Rename it.")


def _chunks(rows: Iterator[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def _function_tag(tags: dict[str, Tag], request: Request) -> str:
    functions = [name for name, tag in tags.items() if tag.kind == "function"]
    if request.tag is not None:
        if request.tag not in functions:
            raise UserError(f"--tag: {request.tag!r} is no function tag here. {did_you_mean(request.tag, functions)}")
        return request.tag
    if len(functions) != 1:
        raise UserError(
            f"{request.libraries[0]}: holds {len(functions)} function tags ({', '.join(functions) or 'none'}); predict "
            "needs one. Choose it with --tag."
        )
    return functions[0]
