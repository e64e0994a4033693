"""What a run does between its steps: scores on the validation split, and heads fitted in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from tagllm.build import Built
from tagllm.config import Split
from tagllm.data.batch import Batch
from tagllm.data.collate import Collator
from tagllm.evaluate.choosing import clearly_better
from tagllm.evaluate.closed_form import fit_head
from tagllm.evaluate.features import Features
from tagllm.evaluate.metrics import value_metrics
from tagllm.evaluate.passes import Pass, run_over
from tagllm.evaluate.scoring import by_head
from tagllm.evaluate.value_probes import probe_of
from tagllm.head import Head
from tagllm.model.loss import nats_per_token
from tagllm.model.tagged import Output
from tagllm.model.value_head import HeadModule
from tagllm.ranks import Ranks
from tagllm.train.engine import Engine
from tagllm.train.signals import StopAsked, StopRequest

SOME_ROWS = 4096
"""Training rows that closed-form fits look at before training has ended; FIT_ROWS then."""
SCALE_ROWS = 256
"""Training rows that tell the centre and scale of what a head reads."""


class Validation:
    """Passes over examples with the engine as it stands. A signal to any rank ends them with `StopAsked`."""

    def __init__(self, built: Built, engine: Engine, ranks: Ranks, stop: StopRequest) -> None:
        self.built, self.engine, self.ranks, self.stop = built, engine, ranks, stop
        self.collate = built.collator()

    def held_out(self, probing: bool = False) -> Pass | None:
        """The validation split through the model as it is, with what heads read; None without such rows. `probing` as
        in `seen_by_heads`, where that is possible."""
        if not any(map(len, self.built.examples("valid"))):
            return None
        probing = probing and self._can_probe
        return self._pass("valid", collate=self.collate.probing() if probing else self.collate)

    def loss(self, result: Pass) -> float:
        return result.loss(self.built.stage.weights)

    def scalars(self, result: Pass) -> dict[str, float]:
        """Loss and metrics of the validation split; of each head on its own rows, by name where there are several."""
        scalars = {"valid/loss": self.loss(result)}
        found = nats_per_token(result.sums, result.counts) | by_head(self.built, "valid", result, value_metrics)
        return scalars | {f"valid/{name}": value for name, value in found.items()}

    def scale_heads(self) -> None:
        """Tells learned heads the scale of the means they read."""
        for name, head in self._learned_heads(classes=True).items():
            if head.spec.reads == "last":
                continue
            mean_nD = self._pass("train", limit=SCALE_ROWS, tag=name).mean_nD
            keys, learned = _keys(name), self.engine.learned()
            raw = head.folded(*(learned[key] for key in keys))
            head.set_scale_of(torch.from_numpy(mean_nD))
            self.engine.overwrite(dict(zip(keys, head.unfolded(*raw), strict=True)))

    def seen_by_heads(self, limit: int = SOME_ROWS, probing: bool = False) -> dict[str, Pass]:
        """What each head to be refitted reads of up to `limit` training rows. `probing` serves ridge baselines too: of
        every learned head, with the state before the function tag."""
        collate = self.collate.probing() if probing else self.collate
        names = [name for name, head in self._learned_heads().items() if probing or head.spec.refit]
        return {name: self._pass("train", limit=limit, tag=name, collate=collate) for name in names}

    def refit_heads(self, held_out: Pass | None, seen: Mapping[str, Pass]) -> tuple[dict[str, Head], dict[str, float]]:
        """Closed-form fits on training rows as `seen_by_heads`; those that are kept, since the trained head is not
        clearly better on `held_out`, the validation split with the state as it is (all, without such rows). And the
        losses there, before and after each fit and of what was kept. The model stays as it is."""
        heads, report = dict[str, Head](), dict[str, float]()
        for name, module in self._learned_heads().items():
            if not module.spec.refit:
                continue
            mine_n, blank = self.built.rows_with("valid", name), self._blank(name)
            train = seen[name].rows(module.spec)
            valid = train.some(slice(0)) if held_out is None else held_out.rows(module.spec).some(mine_n)
            fit = self.ranks.on_rank_zero(partial(fit_head, blank, train, valid))
            if held_out is None:
                heads[name] = fit
                continue
            fitted = held_out.answered_by(fit, mine_n)
            report |= {f"refit/{name}_before": self.loss(held_out), f"refit/{name}_after": self.loss(fitted)}
            before, after = (one.errors(fit)[mine_n] for one in (held_out, fitted))
            if not self.ranks.on_rank_zero(partial(clearly_better, before, after)):  # CPUs may differ in the last digit
                heads[name], held_out = fit, fitted
        return heads, report | ({} if held_out is None else {"valid/loss_refitted": self.loss(held_out)})

    def probes(self, seen: Mapping[str, Pass], held_out: Pass | None) -> dict[Split, Features]:
        """Features for the baselines of eval, of passes that were `probing`; none unless there is one such head, and no
        other."""
        layout = self.built.layout
        if len(seen) != 1 or len(layout.heads) != 1:
            return {}
        ((name, train),) = seen.items()
        probes: dict[Split, Features] = {"train": probe_of(train, np.ones(len(train.targets_nK), bool), layout, name)}
        if held_out is not None and self._can_probe:
            probes["valid"] = probe_of(held_out, self.built.rows_with("valid", name), layout, name)
        return probes

    @property
    def _can_probe(self) -> bool:
        """Whether a pass for probes tells the loss as well: it leaves those of tokens out."""
        return not self.built.stage.terms

    def _forward(self, batch: Batch) -> Output:
        if self.ranks.sum([float(self.stop.requested)])[0]:
            raise StopAsked
        return self.engine(batch)

    def _learned_heads(self, classes: bool = False) -> dict[str, HeadModule]:
        """Regression heads that are learned, and with `classes` the others too, which have no closed form."""
        heads = {name: head for name, head in self.built.model.heads.items() if name in self.built.layout.learned}
        return {n: h for n, h in heads.items() if isinstance(h, HeadModule) and (classes or not h.spec.classes)}

    def _blank(self, name: str) -> Head:
        head = self.built.tags[name].head
        assert head is not None
        return head.blank()

    def _pass(
        self, split: Split, limit: int | None = None, tag: str | None = None, collate: Collator | None = None
    ) -> Pass:
        """Rows of the sources with `tag` through the model as it is."""
        sources, draws = self.built.examples(split), self.built.draws(split, limit, tag)
        size = self.built.config.evaluation.rows_per_batch
        with self.engine.evaluating():
            return run_over(self._forward, sources, draws, collate or self.collate, self.ranks, size, features=True)


def _keys(name: str) -> tuple[str, str]:
    """Of the parameters of a head."""
    return f"heads.{name}.weight_KF", f"heads.{name}.bias_K"
