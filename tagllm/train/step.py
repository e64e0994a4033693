"""One optimizer step over all ranks: rows -> micro-batches -> counts -> backward each -> update, or none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tagllm.build import Built
from tagllm.data.batch import Batch, Counts, count
from tagllm.data.collate import no_batch
from tagllm.data.encode import Example
from tagllm.data.layout import TagLayout
from tagllm.errors import SharedError
from tagllm.model.loss import nats_per_token, total
from tagllm.ranks import Ranks
from tagllm.train.engine import Engine
from tagllm.train.rows import StepRows
from tagllm.train.schedule import lr_factor, total_steps
from tagllm.train.signals import StopRequest
from tagllm.train.work import Work, work_of


class Step(NamedTuple):
    """What a step did, over all ranks."""

    loss: float
    sums: list[float]
    counts: Counts
    gradient_norm: float
    gradient_norms: dict[str, float]
    """Of each learned tag and head, before clipping."""
    lr_factor: float
    work: Work
    stop_asked: bool
    """A signal has reached one of the ranks."""
    suspects: list[str]
    """Some rows of all ranks behind a number that is not finite; empty if all are."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    def scalars(self) -> dict[str, float]:
        terms = {f"train/{name}": nats for name, nats in nats_per_token(self.sums, self.counts).items()}
        if self.counts.value:
            terms["train/value_loss"] = self.sums[-1] / self.counts.value
        norms = {f"{name}/gradient_norm": norm for name, norm in self.gradient_norms.items()}
        return {"train/loss": self.loss, **terms, "train/gradient_norm": self.gradient_norm, **norms}


class Stepper:
    """Takes steps. Which rows a step sees is a function of config and data alone."""

    def __init__(self, built: Built, engine: Engine, ranks: Ranks, stop: StopRequest) -> None:
        self.built, self.engine, self.ranks, self.stop = built, engine, ranks, stop
        self.optim, self.collate = built.config.optim, built.collator()
        self.rows = StepRows(built.config, built.examples("train"), ranks.rank, ranks.size)
        self.total = total_steps(self.optim, self.rows.rows_per_epoch)

    def take(self, step: int) -> Step:
        """Step `step`, counted from 0. Where loss or gradient is not finite everything stays as it was.

        Raises:
            UserError: rows could not be made a batch, on all ranks alike.
        """
        chunks, batches, counts = self._batches(step)
        sums, suspects = [0.0, 0.0, 0.0], list[Example]()
        for batch, chunk in zip(batches, chunks, strict=True):
            output = self.engine(batch)
            self.engine.backward(total(output.sums, counts, self.built.stage.weights))
            found = [float(term.detach()) for term in output.sums]
            sums = [a + b for a, b in zip(sums, found, strict=True)]
            suspects += [] if all(map(math.isfinite, found)) else chunk
        work = work_of(batches, self.built.model.take_computed())
        *totals, stops = self.ranks.sum([*sums, *work, float(self.stop.requested)])
        sums, work = totals[: len(sums)], Work(*totals[len(sums) :])
        loss = self.built.stage.weights.of(sums, counts)
        norms, factor = _norms(self.engine.gradients(), self.built.layout), lr_factor(self.optim, step, self.total)
        done = Step(loss, sums, counts, math.hypot(*norms.values()), norms, factor, work, stops > 0, [])
        if done.finite:
            self.engine.step(factor)
            return done
        self.engine.skip()
        return done._replace(suspects=self._named(suspects or [example for chunk in chunks for example in chunk]))

    def _batches(self, step: int) -> tuple[list[list[Example]], list[Batch], Counts]:
        """This rank's micro-batches and the counts of all ranks'. A rank that fails stops all, before they wait for it
        elsewhere."""
        chunks, batches, problem = list[list[Example]](), list[Batch](), ""
        try:
            chunks = self.rows.micro_batches(step)
            batches = [self.collate(chunk) for chunk in chunks]
        except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
            problem = no_batch(self.collate, [example for chunk in chunks for example in chunk], error)
        *counts, failures = self.ranks.sum([*_added([count(batch) for batch in batches]), float(bool(problem))])
        if failures:
            told = [text for text in self.ranks.gather(problem) if text]
            raise SharedError(*(f"step {step + 1}: {text}. Mend or remove the row, then start again." for text in told))
        return chunks, batches, Counts(*(int(n) for n in counts))

    def _named(self, suspects: list[Example]) -> list[str]:
        mine = [f"{example.origin}: {self.built.prompt_of(example)}" for example in suspects[:2]]
        return [text for texts in self.ranks.gather(mine) for text in texts]


def _norms(gradients: Mapping[str, Tensor], layout: TagLayout) -> dict[str, float]:
    """tags/NAME from its rows, heads/NAME over its parameters."""
    of: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        if name == "tags.learned_TD":
            of |= {f"tags/{tag}": [part] for tag, part in layout.by_learned_tag(gradient).items()}
        else:
            of.setdefault("/".join(name.split(".")[:2]), []).append(gradient)
    found = torch.stack([nn.utils.get_total_norm(parts) for parts in of.values()])
    return dict(zip(of, found.tolist(), strict=True))  # one transfer from the device


def _added(counts: list[Counts]) -> list[float]:
    """Of no batch at all: zeros."""
    return [float(sum(column)) for column in zip(*counts, strict=True)] or [0.0] * len(Counts._fields)
