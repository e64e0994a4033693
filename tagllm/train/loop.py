"""The one training loop. A stage is data: which tags are learned, which rows, which loss terms."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tagllm.config import RunConfig, Split
from tagllm.data.batch import Batch, Counts, count
from tagllm.data.sampler import Draw, Sampler, deal
from tagllm.errors import UserError
from tagllm.evaluate.metrics import value_metrics
from tagllm.evaluate.passes import Pass, all_draws, home_of, run_over
from tagllm.evaluate.ridge import fit_ridge
from tagllm.files import RunLock
from tagllm.model.loss import total
from tagllm.model.tagged import HeadModule
from tagllm.stage import check_world, read_stage
from tagllm.tags import Head, Tag, TagLibrary
from tagllm.train import checkpoint
from tagllm.train.build import Built, build
from tagllm.train.engine import Engine
from tagllm.train.monitor import Monitor, peak_memory_gib
from tagllm.train.ranks import Ranks
from tagllm.train.run_folder import RunFolder
from tagllm.train.schedule import lr_factor, total_steps
from tagllm.train.signals import Stopped, StopRequest

REFIT_ROWS = 5000
"""Closed-form fits look at so many training rows at most."""


class Step(NamedTuple):
    """What one optimizer step did, over all ranks."""

    loss: float
    sums: list[float]
    counts: Counts
    gradient_norm: float
    live_tokens: float
    frozen_tokens: float


class Progress(NamedTuple):
    """Where a run stands; goes into every checkpoint."""

    best_loss: float = math.inf
    best_step: int = -1
    worse_in_a_row: int = 0
    done: bool = False


def train(config: RunConfig, where: str) -> Path:
    """Trains the learned tags of a config and leaves a run folder with their library; goes on where a run stopped.

    Raises:
        UserError: any mistake in config, data, libraries or folder; on every rank.
        Stopped: SIGTERM or SIGUSR1 came; the state is saved.
    """
    stage = read_stage(config, where)
    ranks = Ranks.start(config.engine.timeout_s)
    ranks.on_rank_zero(lambda: check_world(config, ranks.size, where))  # told once
    run = RunFolder(Path(config.output))
    lock = RunLock(run.path)
    with StopRequest() as stop:

        def claim() -> None:
            lock.__enter__()  # held until the process ends or `release` below
            run.claim(config)

        ranks.on_rank_zero(claim)
        built = build(stage, ranks)
        ranks.on_rank_zero(lambda: run.record(built.data))
        engine = Engine(built.model, config.optim, config.engine, ranks)
        trainer = Trainer(built, engine, ranks, run, stop)
        trainer.run_to_the_end()
        lock.release()
    return run.path


class Trainer:
    """Holds what the loop needs; `run_to_the_end` is the story."""

    def __init__(self, built: Built, engine: Engine, ranks: Ranks, run: RunFolder, stop: StopRequest) -> None:
        self.built, self.engine, self.ranks, self.run, self.stop = built, engine, ranks, run, stop
        self.config, self.sources = built.config, built.examples("train")
        self.collate = built.stage.collator(built.layout)
        shares = {
            "proportional": None,
            "equal": [1.0] * len(self.sources),
            "given": [s.weight for s in self.config.data.sources],
        }
        sizes = [len(examples) for examples in self.sources]
        self.sampler = Sampler(sizes, shares[self.config.data.mix], self.config.optim.rows_per_step, self.config.seed)
        self.total = total_steps(self.config.optim, sum(sizes))
        self.progress, self.best = Progress(), dict[str, Tensor]()

    def run_to_the_end(self) -> None:
        first = self._resume()
        if self.progress.done:
            return
        every = self.config.evaluation.every_steps or max(1, math.ceil(self.total / 4))
        with Monitor(self.run.path, self.total, first, self.ranks.rank > 0) as self.monitor:
            if first == 0:
                self._fit_heads_at_start()
            step, self.stop.training = first, True
            while step < self.total:
                started = time.monotonic()
                done = self.train_step(step)
                step += 1
                self._log(step, done, time.monotonic() - started)
                if step % every == 0 or step == self.total:
                    self._evaluate(step)
                if self._out_of_patience():
                    break
                if step % self.config.checkpoint.every_steps == 0 or self._stop_asked():
                    self._save(step)
            self._finish(step)

    def train_step(self, step: int) -> Step:
        """Rows -> micro-batches -> counts over all ranks -> backward each -> one optimizer step."""
        batches = self._micro_batches(self.sampler.step(step))
        counts = Counts(*(int(n) for n in self.ranks.sum(_added([count(batch) for batch in batches]))))
        sums = [0.0, 0.0, 0.0]
        for batch in batches:
            output = self.engine(batch)
            self.engine.backward(total(output.sums, counts, self.built.stage.weights))
            sums = [a + float(b.detach()) for a, b in zip(sums, output.sums, strict=True)]
        live = sum(int(batch.live_mask_BL.sum()) for batch in batches)
        frozen = sum(int(batch.prefix_mask_BP.sum()) for batch in batches)
        *sums, live_tokens, frozen_tokens = self.ranks.sum([*sums, live, frozen])
        loss = sum(w * s / c for w, s, c in zip(self.built.stage.weights, sums, counts, strict=True) if c)
        if not math.isfinite(loss):
            raise UserError(
                f"step {step + 1}: the loss is {loss}; nothing was updated in this step. Lower optim.tag_lr (it is "
                f"{self.config.optim.tag_lr}) or optim.head_lr, or look for extreme targets."
            )
        norm = self.engine.step(lr_factor(self.config.optim, step, self.total))
        return Step(loss, sums, counts, norm, live_tokens, frozen_tokens)

    def _micro_batches(self, draws: list[Draw]) -> list[Batch]:
        """This rank's rows, alike in length within a micro-batch."""
        mine = deal(draws, [home_of(draw) for draw in draws], self.ranks.size)[self.ranks.rank]
        examples = [(self.sources[d.source][d.row], self.sources[d.source].uid(d.row)) for d in mine]
        examples.sort(key=lambda pair: (len(pair[0].ids), pair[1]))
        size = self.config.optim.rows_per_micro_batch
        chunks = [examples[at : at + size] for at in range(0, len(examples), size)]
        return [self.collate([e for e, _ in chunk], [uid for _, uid in chunk]) for chunk in chunks]

    def _pass(self, split: Split, features: bool = False, limit: int | None = None, tag: str | None = None) -> Pass:
        """Held-out (or training) rows, of the sources with `tag`, through the model as it is, without a graph."""
        pairs = zip(self.built.examples(split), self.built.stage.templates, strict=True)
        sources = [examples for examples, template in pairs if tag is None or tag in template.tags]
        size = self.config.evaluation.rows_per_batch
        with self.engine.evaluating():
            return run_over(self.engine, sources, all_draws(sources, limit), self.collate, self.ranks, size, features)

    def _evaluate(self, step: int) -> None:
        """Scores the validation split and keeps the best state."""
        if not any(map(len, self.built.examples("valid"))):
            return
        result = self._pass("valid")
        loss = result.loss(self.built.stage.weights)
        self._note_best(step, loss)
        scalars = {"valid/loss": loss}
        for name, total_, n in zip(("span", "output"), result.sums, result.counts, strict=False):
            scalars |= {f"valid/{name}_nats": total_ / n} if n else {}
        scalars |= {
            f"valid/{k}": v for k, v in value_metrics(result.values_nK, result.targets_nK, self._classes()).items()
        }
        self.monitor.log(step, scalars)
        shown = "  ".join(f"{name.removeprefix('valid/')} {value:.4f}" for name, value in scalars.items())
        self.monitor.say(
            f"step {step}/{self.total}  held out: {shown}{'  *' if self.progress.best_step == step else ''}"
        )

    def _note_best(self, step: int, loss: float) -> None:
        learned = self.engine.learned()
        if loss < self.progress.best_loss:
            self.progress, self.best = Progress(loss, step, 0), learned
        else:
            self.progress = self.progress._replace(worse_in_a_row=self.progress.worse_in_a_row + 1)

    def _out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.worse_in_a_row >= patience

    def _classes(self) -> bool:
        return any(head.classes for head in self.built.layout.heads.values())

    def _fit_heads_at_start(self) -> None:
        """`init: ridge`: the head starts where a probe on the untrained tag ends."""
        for name, head in self._learned_heads().items():
            if head.spec.init == "ridge":
                fitted = self._fit(name, head, self._pass("train", features=True, limit=REFIT_ROWS, tag=name))
                self.engine.overwrite(fitted)

    def _refit_heads(self) -> dict[str, float]:
        """Closed-form fit on the trained rows, kept only if better on validation. Returns validation losses."""
        report: dict[str, float] = {}
        for name, head in self._learned_heads().items():
            if not head.spec.refit or not any(map(len, self.built.examples("valid"))):
                continue
            before = self._pass("valid").loss(self.built.stage.weights)
            kept = self.engine.learned()
            self.engine.overwrite(self._fit(name, head, self._pass("train", features=True, limit=REFIT_ROWS, tag=name)))
            after = self._pass("valid").loss(self.built.stage.weights)
            report |= {f"refit/{name}_before": before, f"refit/{name}_after": after}
            if not after < before:
                self.engine.overwrite(kept)
        return report

    def _learned_heads(self) -> dict[str, HeadModule]:
        heads = {name: head for name, head in self.built.model.heads.items() if name in self.built.layout.learned}
        return {n: h for n, h in heads.items() if isinstance(h, HeadModule) and not h.spec.classes}

    def _fit(self, name: str, head: HeadModule, result: Pass) -> dict[str, Tensor]:
        """Standardised targets, since the head undoes the standardisation."""
        width = head.spec.outputs
        targets = (result.targets_nK[:, :width] - head.mean_K.cpu().numpy()) / head.std_K.cpu().numpy()
        fit = fit_ridge(result.features(head.spec.reads), targets)
        weight, bias = torch.from_numpy(fit.weight_KF), torch.from_numpy(fit.bias_K)
        return {f"heads.{name}.weight_KF": weight, f"heads.{name}.bias_K": bias}

    def _finish(self, step: int) -> None:
        """Last and best states become libraries; heads are refitted on the best."""
        last = self.engine.learned()
        if self.best:
            self.engine.overwrite(self.best)
        scalars = self._refit_heads()
        self.monitor.log(step, scalars)
        result = self.engine.learned()
        about = {"steps": step, "best_step": self.progress.best_step, **scalars}
        peak = self.ranks.sum([peak_memory_gib()])[0]
        self.monitor.log(step, {"memory/peak_gib_all_ranks": peak})

        def save() -> None:
            self._library(last, about).save(self.run.last)
            self._library(result, about).save(self.run.library)

        self.ranks.on_rank_zero(save)
        self.engine.overwrite(last)
        self.progress = self.progress._replace(done=True)
        self._save(step, final=True)
        self.monitor.say(f"library: {self.run.library}")

    def _library(self, learned: dict[str, Tensor], about: dict[str, Any]) -> TagLibrary:
        """All tags of the run: learned ones as given, loaded ones bit for bit."""
        library = TagLibrary(self.built.backbone.identity)
        layout, config = self.built.layout, self.config
        rows = dict(
            zip(
                layout.learned,
                learned["tags.learned_TD"].split([layout.lengths[n] for n in layout.learned]),
                strict=True,
            )
        )
        for name, tag in self.built.tags.items():
            if name not in rows:
                library = library.add(tag)
                continue
            head = tag.head
            if head is not None:
                weight, bias = (learned[f"heads.{name}.{part}"] for part in ("weight_KF", "bias_K"))
                head = Head(head.spec, weight, bias, head.mean_K, head.std_K)
            used = [s for s, t in zip(config.data.sources, self.built.stage.templates, strict=True) if name in t.tags]
            history = {
                "template": used[0].template, "target": used[0].target, "output": used[0].output,
                "fields": {k: v.model_dump() for k, v in used[0].fields.items()}, "trained_with": list(self.built.tags),
                "config_digest": config.digest(), "created": time.strftime("%Y-%m-%d"), **about,
            }  # fmt: skip
            library = library.add(Tag(name, tag.kind, rows[name], head, history))
        return library

    def _log(self, step: int, done: Step, seconds: float) -> None:
        memory = self.built.model.memory
        names = ("span_nats", "output_nats", "value_loss")
        terms = {f"train/{k}": s / c for k, s, c in zip(names, done.sums, done.counts, strict=True) if c}
        self.monitor.log(
            step,
            {
                "train/loss": done.loss, **terms, "train/gradient_norm": done.gradient_norm,
                "train/lr_factor": lr_factor(self.config.optim, step - 1, self.total),
                "speed/seconds": seconds, "speed/rows_per_second": self.config.optim.rows_per_step / seconds,
                "speed/live_tokens_per_second": done.live_tokens / seconds,
                "speed/frozen_tokens_per_second": done.frozen_tokens / seconds,
                "speed/prefix_hit_ratio": memory.hits / max(memory.lookups, 1) if memory else math.nan,
                "memory/peak_gib_rank0": peak_memory_gib(),
            },
        )  # fmt: skip

    def _stop_asked(self) -> bool:
        """A signal to any one rank stops all of them after the same step."""
        self._stopping = self.ranks.sum([float(self.stop.requested)])[0] > 0
        return self._stopping

    def _save(self, step: int, final: bool = False) -> None:
        """A checkpoint of the step. A save that fails warns, and training goes on."""
        tensors = self.engine.state() | {f"best.{name}": value for name, value in self.best.items()}
        progress = self.progress._asdict()
        identity = self.built.identity()

        def write() -> str:
            state = checkpoint.TrainState(step, tensors, progress, identity)
            try:
                checkpoint.save(self.run.checkpoints, state, self.config.checkpoint.keep)
            except checkpoint.SaveFailed as error:
                return str(error)
            return ""

        failure = self.ranks.on_rank_zero(write)
        if failure:
            self.monitor.say(f"warning: {failure}")
        if not final and self._stop_asked():
            if failure:
                raise UserError(f"stopped at step {step}, which is not saved: {failure}")
            raise Stopped(
                f"stopped after step {step} of {self.total}; the state is saved. Start the same command again."
            )

    def _resume(self) -> int:
        """Restores the newest sound checkpoint; returns the step to go on from (0: a fresh start)."""

        def read() -> checkpoint.TrainState | None:
            state, skipped = checkpoint.load_newest(self.run.checkpoints)
            for line in skipped:
                print(f"warning: {line}", flush=True)
            if state is None and skipped:
                raise UserError(
                    f"{self.run.checkpoints}: no checkpoint is sound (see the warnings above); starting over would "
                    "overwrite them. Restore one, or give another output=FOLDER."
                )
            if state is not None:
                checkpoint.check_identity(state, self.built.identity())
            return state

        state = self.ranks.on_rank_zero(read)
        if state is None:
            return 0
        self.best = {n.removeprefix("best."): t for n, t in state.tensors.items() if n.startswith("best.")}
        self.progress = Progress(**state.progress)
        self.engine.restore({n: t for n, t in state.tensors.items() if not n.startswith("best.")}, state.step)
        return state.step


def _added(counts: list[Counts]) -> list[float]:
    return [float(sum(column)) for column in zip(*counts, strict=True)]
