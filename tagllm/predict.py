"""`tagllm predict`: a file in, the same rows with predictions in new columns out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tagllm import gpus, launched
from tagllm.build import open_backbone, require_same_everywhere
from tagllm.config import HeadConfig, OptimConfig, SourceConfig
from tagllm.data.collate import Collator
from tagllm.data.encode import Encoder, Example, Unusable
from tagllm.data.layout import TagLayout
from tagllm.data.readers import column_names, read_rows
from tagllm.data.row import BadRow, Row, lost_rows
from tagllm.data.writers import open_writer, writable_kind
from tagllm.errors import SharedError, UserError, did_you_mean
from tagllm.evaluate.dealt import dealt
from tagllm.evaluate.generate import generate
from tagllm.files import sha256_file
from tagllm.head import pools_known
from tagllm.model.prefix import PrefixMemory
from tagllm.model.tagged import TaggedModel
from tagllm.question import Question, Request
from tagllm.ranks import Ranks
from tagllm.rendezvous import in_contact
from tagllm.template import all_pools, pool_of
from tagllm.train.engine import gather_on_use, sharding
from tagllm.train.placement import placed_to_answer

CHUNK_ROWS = 1024
"""Read before they are answered, of each rank: batches are of rows of this many that are as long as each other."""
ERROR = "tagllm_error"
__all__ = ["Predicted", "Predictor", "Request", "predict_file"]


class Predicted(NamedTuple):
    """How many rows were read, have no prediction, were cut to fit, and lost what is no text in other columns."""

    rows: int
    failed: int
    cut: int
    emptied: int


class Predictor:
    """A model, a prompt, and the names of the columns it answers in. Several ranks must all ask the same rows, and
    share the backbone where it is large (`placed_to_answer`)."""

    def __init__(self, request: Request, ranks: Ranks | None = None, question: Question | None = None) -> None:
        """
        Args:
            question: `Question.of(request)`, where it is known already.

        Raises:
            UserError: as `Question.of`; or the backbone is not there, or not the one of the tags.
        """
        question = question or Question.of(request)
        tags, kinds, about = question.tags, question.library.kinds, question.about
        self.spec, self.columns = question.spec, question.columns
        self.ranks = ranks or Ranks(0, 1, torch.device("cuda" if gpus.seen() else "cpu"))
        engine = placed_to_answer(question.backbone, request.engine, self.ranks)
        self.sharded, how = engine.stage == 3, (OptimConfig(steps=1), engine, self.ranks)
        backbone = open_backbone(question.backbone, self.ranks, sharding(*how))
        same = partial(question.library.backbone.require_same, backbone.identity, str(request.libraries[0]))
        self.ranks.on_rank_zero(same)
        heads = {n: tag.head.spec for n, tag in tags.items() if tag.head}
        lengths = {n: len(tag.rows_PD) for n, tag in tags.items()}
        known = pools_known(tag.head for tag in tags.values())
        pools = all_pools([question.template], kinds, pool_of(heads.values()), known)
        layout = TagLayout.of(backbone.vocabulary_size, {n: kinds[n] for n in tags}, lengths, [], heads, pools)
        memory = None if self.sharded else PrefixMemory(0, 0)  # rows are asked once: in few passes, and nothing is kept
        self.model = TaggedModel(backbone.model, tags, layout, memory, reads_tokens=False, attention=backbone.attention)
        self.model.to(self.ranks.device)
        gather_on_use(self.model, *how)
        self.tokenizer, self.rows_per_batch = backbone.tokenizer, request.rows_per_batch
        self.max_new_tokens, self.beams, self.num_cut = question.max_new_tokens, about.get("beams", 1), 0
        room = backbone.max_tokens - (0 if self.spec else self.max_new_tokens)
        limit = min(about.get("max_tokens") or room, room)
        source = SourceConfig(path="-", template=question.template.text, fields=question.fields)
        self.encoder = Encoder(question.template, source, layout, backbone.tokenizer, limit, labelled=False)
        width = max([spec.outputs for spec in heads.values()], default=0)
        block = about.get("mask") == "block"
        self.collate = Collator(
            layout.first_learned_id, (), width, cut_at_function=True, block=block, num_pools=layout.num_pools,
            sharded=self.sharded,
        )  # fmt: skip

    def predict(self, rows: Sequence[dict[str, Any]]) -> list[list[Any] | str]:
        """The values of the new columns for each row, or why it has none."""
        encoded = self.encoder.encode(rows)
        answers: list[list[Any] | str] = [e.reason if isinstance(e, Unusable) else "" for e in encoded]
        usable = [(i, e) for i, e in enumerate(encoded) if isinstance(e, Example)]
        self.num_cut += sum(example.tokens_cut > 0 for _, example in usable)
        answer = self._texts if self.spec is None else partial(self._values, self.spec)
        for (i, _), found in zip(usable, answer([example for _, example in usable]), strict=True):
            answers[i] = found
        return answers

    def _texts(self, examples: list[Example]) -> list[list[Any]]:
        prompts = [example.ids for example in examples]
        how = self.max_new_tokens, self.beams, self.rows_per_batch, self.ranks
        return [[text] for text in generate(self.model, self.tokenizer, prompts, *how)]

    def _values(self, spec: HeadConfig, examples: list[Example]) -> list[list[Any]]:
        lengths = [len(example.ids) for example in examples]
        return dealt(lengths, self.rows_per_batch, partial(self._values_of, spec, examples), self.ranks)

    @torch.no_grad()
    def _values_of(self, spec: HeadConfig, examples: list[Example], rows: list[int]) -> list[list[Any]]:
        """Of one batch: the class and the probability of each, or the value of each target."""
        batch = self.collate([examples[row] for row in rows]).to(self.ranks.device)
        values_BK = self.model(batch).values_BK[:, : spec.outputs].float().cpu()
        if spec.classes:
            of_classes = values_BK.softmax(dim=1).tolist()
            return [[spec.classes[int(np.argmax(each))], *each] for each in of_classes]
        return [[float(value) for value in row] for row in values_BK]


def predict_file(request: Request, source: Path, output: Path) -> Predicted:
    """Reads `source`, writes `output`; under a launcher rank 0 does.

    Every input row has one output row, in the same order, with its columns untouched (empty where they are no text),
    the prediction in new columns, and in `tagllm_error` the reason where there is none.

    Raises:
        UserError: unreadable input, a quote that is not closed, a missing or clashing column, unknown tag, damaged
            library, other backbone.
        LostContact: another rank died, hangs or is cut off.
    """
    writable_kind(output)
    if output.resolve() == source.resolve():
        raise UserError(f"{output}: is the input file; input is never overwritten. Name another output.")
    columns, question = column_names(source), Question.of(request)
    new = [*question.columns, ERROR]
    if missing := [name for name in question.template.fields if name not in columns]:
        has_not = f"{source}: there is no column"
        raise UserError(*(f"{has_not} {n!r}, which the template needs. {did_you_mean(n, columns)}" for n in missing))
    _refuse_clash(str(source), columns, new)
    if launched.rank() == 0:
        for note in question.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    if launched.world_size() == 1:
        return _answered(Predictor(request, question=question), source, output, columns)
    ranks = Ranks.start(request.engine.timeout_s)
    with in_contact(ranks.silent, lambda: f"rank {ranks.rank} predicting {source}"):
        require_same_everywhere(ranks.gather({str(source): sha256_file(source)}))
        return _answered(Predictor(request, ranks, question), source, output, columns)


def _answered(predictor: Predictor, source: Path, output: Path, columns: Sequence[str]) -> Predicted:
    """Writes each row with its answer. All ranks read the same ones, so what is wrong with them is told once."""
    new, total, failed, emptied = [*predictor.columns, ERROR], 0, 0, 0
    with open_writer(output, [*columns, *new]) if predictor.ranks.rank == 0 else nullcontext() as writer:
        for read in _chunks(read_rows(source), CHUNK_ROWS * predictor.ranks.size):
            chunk = [_without_others(row, predictor.encoder.template.fields) for row in read]
            emptied += sum(type(row) is not type(as_read) for row, as_read in zip(chunk, read, strict=True))
            readable = [row.values for row in chunk if isinstance(row, Row)]
            answers = iter(predictor.predict(readable))
            for row in chunk:
                if isinstance(row, BadRow) and (told := lost_rows(str(source), row.line, row.reason)):
                    raise SharedError(told)
                answer = f"line {row.line}: {row.reason}" if isinstance(row, BadRow) else next(answers)
                values = dict.fromkeys(columns) | (row.values or {}) if isinstance(row, BadRow) else row.values
                _refuse_clash(f"{source}, line {row.line}", values, new)  # objects may have columns of their own
                good = isinstance(answer, list)
                predicted = answer if isinstance(answer, list) else [None] * len(predictor.columns)
                if writer:
                    writer.write({**values, **dict(zip(new, [*predicted, "" if good else answer], strict=True))})
                total, failed = total + 1, failed + (not good)
    return Predicted(total, failed, predictor.num_cut, emptied)


def _refuse_clash(where: str, columns: Collection[str], new: Sequence[str]) -> None:
    if clash := [name for name in new if name in columns]:
        raise SharedError(f"{where}: has a column {clash[0]!r} already, and inputs are never overwritten. Rename it.")


def _without_others(row: Row | BadRow, fields: Collection[str]) -> Row | BadRow:
    """The row without text that cannot be read, where that is of no field."""
    if isinstance(row, BadRow) and row.illegible and {*row.illegible}.isdisjoint(fields):
        return Row(row.line, row.values or {})
    return row


def _chunks(rows: Iterator[Row | BadRow], size: int) -> Iterator[list[Row | BadRow]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk
