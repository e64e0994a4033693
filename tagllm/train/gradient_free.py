"""What a run does without a gradient: scores on held-out rows, and heads fitted in closed form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagllm.config import Split
from tagllm.data.batch import Batch
from tagllm.data.collate import Collator
from tagllm.evaluate.baselines import Probe
from tagllm.evaluate.metrics import value_metrics
from tagllm.evaluate.passes import Floats, Pass, all_draws, run_over
from tagllm.evaluate.ridge import Rows, clearly_better, fit_ridge
from tagllm.model.tagged import HeadModule, Output
from tagllm.train.build import Built
from tagllm.train.engine import Engine
from tagllm.train.ranks import Ranks
from tagllm.train.signals import StopAsked, StopRequest

FIT_ROWS = 20_000
"""Closed-form fits look at so many training rows at most."""
SOME_ROWS = 4096
"""And at so many before training has ended."""
SCALE_ROWS = 256
"""Training rows that tell the centre and scale of what a head reads."""


class GradientFree:
    """Passes over examples with the engine as it stands. A signal to any rank ends them with `StopAsked`."""

    def __init__(self, built: Built, engine: Engine, ranks: Ranks, stop: StopRequest) -> None:
        self.built, self.engine, self.ranks, self.stop = built, engine, ranks, stop
        self.collate = built.collator()

    def held_out(self) -> Pass | None:
        """The validation split through the model as it is, with what heads read; None without such rows."""
        return self._pass("valid", features=True) if any(map(len, self.built.examples("valid"))) else None

    def loss(self, result: Pass) -> float:
        return result.loss(self.built.stage.weights)

    def scalars(self, result: Pass) -> dict[str, float]:
        """Loss and metrics of the validation split."""
        scalars = {"valid/loss": self.loss(result)}
        for name, total, n in zip(("span", "output"), result.sums, result.counts, strict=False):
            scalars |= {f"valid/{name}_nats": total / n} if n else {}
        classes = any(head.classes for head in self.built.layout.heads.values())
        metrics = value_metrics(result.values_nK, result.targets_nK, classes)
        return scalars | {f"valid/{name}": value for name, value in metrics.items()}

    def scale_heads(self) -> None:
        """Tells learned heads the scale of the means they read."""
        for name, head in self._learned_heads(classes=True).items():
            if head.spec.reads == "last":
                continue
            mean_nD = self._pass("train", features=True, limit=SCALE_ROWS, tag=name).mean_nD
            keys, learned = _keys(name), self.engine.learned()
            raw = head.folded(*(learned[key] for key in keys))
            head.set_scale_of(torch.from_numpy(mean_nD))
            self.engine.overwrite(dict(zip(keys, head.unfolded(*raw), strict=True)))

    def seen_by_heads(self, limit: int = SOME_ROWS, probing: bool = False) -> dict[str, Pass]:
        """What each head to be refitted reads of up to `limit` training rows. `probing` serves ridge baselines too: of
        every learned head, with the state before the function tag."""
        collate = self.collate.probing() if probing else self.collate
        names = [name for name, head in self._learned_heads().items() if probing or head.spec.refit]
        return {name: self._pass("train", features=True, limit=limit, tag=name, collate=collate) for name in names}

    def refit_heads(self, held_out: Pass, seen: Mapping[str, Pass]) -> dict[str, float]:
        """Closed-form fits on training rows as `seen_by_heads`, each kept unless the trained head is clearly better on
        `held_out`, the validation split with the state as it is. Returns the losses there, before and after each
        fit and of what was kept; after a signal the state is as it was."""
        report: dict[str, float] = {}
        kept, valid = self.engine.learned(), held_out
        try:
            for name, head in self._learned_heads().items():
                if not head.spec.refit:
                    continue
                before = self.engine.learned()
                self.engine.overwrite(self._fitted(name, head, seen[name], valid))
                fitted = self._pass("valid")
                report |= {f"refit/{name}_before": self.loss(held_out), f"refit/{name}_after": self.loss(fitted)}
                if clearly_better(_errors(held_out, head), _errors(fitted, head)):
                    self.engine.overwrite(before)
                else:
                    held_out = fitted
        except StopAsked:
            self.engine.overwrite(kept)
            raise
        return report | {"valid/loss_refitted": self.loss(held_out)}

    def probe(self, seen: Mapping[str, Pass]) -> Probe | None:
        """Features for the ridge baselines of eval, of passes that were `probing`; None without such a head."""
        return Probe.together([Probe.of(one, self.built.layout) for one in seen.values()]) if seen else None

    def _forward(self, batch: Batch) -> Output:
        if self.ranks.sum([float(self.stop.requested)])[0]:
            raise StopAsked
        return self.engine(batch)

    def _learned_heads(self, classes: bool = False) -> dict[str, HeadModule]:
        """Regression heads that are learned, and with `classes` the others too, which have no closed form."""
        heads = {name: head for name, head in self.built.model.heads.items() if name in self.built.layout.learned}
        return {n: h for n, h in heads.items() if isinstance(h, HeadModule) and (classes or not h.spec.classes)}

    def _fitted(self, name: str, head: HeadModule, train: Pass, valid: Pass) -> dict[str, Tensor]:
        fit = fit_ridge(_rows(train, head), _rows(valid, head).some(self._with_tag("valid", name)))
        own = head.unfolded(torch.from_numpy(fit.weight_KF), torch.from_numpy(fit.bias_K))
        return dict(zip(_keys(name), own, strict=True))

    def _with_tag(self, split: Split, tag: str) -> NDArray[np.bool_]:
        """Which rows of a pass over the whole split stand in a prompt with this tag."""
        pairs = zip(self.built.examples(split), self.built.stage.templates, strict=True)
        return np.concatenate([np.full(len(examples), tag in template.tags) for examples, template in pairs])

    def _pass(
        self, split: Split, features: bool = False, limit: int | None = None, tag: str | None = None,
        collate: Collator | None = None,
    ) -> Pass:  # fmt: skip
        """Rows of the sources with `tag` through the model as it is."""
        pairs = zip(self.built.examples(split), self.built.stage.templates, strict=True)
        sources = [examples for examples, template in pairs if tag is None or tag in template.tags]
        size = self.built.config.evaluation.rows_per_batch
        with self.engine.evaluating():
            draws = all_draws(sources, limit)
            return run_over(self._forward, sources, draws, collate or self.collate, self.ranks, size, features)


def _rows(result: Pass, head: HeadModule) -> Rows:
    """With standardised targets, since the head undoes the standardisation."""
    features_nF, targets_nK = result.rows(head.spec.reads)
    mean_K, std_K = head.mean_K.cpu().numpy(), head.std_K.cpu().numpy()
    return Rows(features_nF, (targets_nK[:, : head.spec.outputs] - mean_K) / std_K)


def _errors(result: Pass, head: HeadModule) -> Floats:
    """Squared error (n) of each row as `head` sees targets, standardised. Rows of other heads are the same before and
    after its fit, so that they change no comparison."""
    width = head.spec.outputs
    error_nK = (result.values_nK[:, :width] - result.targets_nK[:, :width]) / head.std_K.cpu().numpy()
    errors_n: Floats = np.nan_to_num(error_nK**2, posinf=np.inf).sum(axis=1)
    return errors_n


def _keys(name: str) -> tuple[str, str]:
    """Of the parameters of a head."""
    return f"heads.{name}.weight_KF", f"heads.{name}.bias_K"
