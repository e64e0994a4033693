"""The one training loop. A stage is data: which tags are learned, which rows, which loss terms."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from tagllm.build import Built, build, loaded_digest, refuse_trained_on
from tagllm.config import RunConfig, Split
from tagllm.contradictions import check_world
from tagllm.errors import SharedError
from tagllm.evaluate.closed_form import FIT_ROWS
from tagllm.files import writing
from tagllm.head import fields_alone
from tagllm.model.backbone import fastest_dtype
from tagllm.origin import hardware, peak_memory_gib
from tagllm.ranks import Ranks
from tagllm.rendezvous import in_contact
from tagllm.run_folder import RunFolder
from tagllm.run_lock import RunLock
from tagllm.stage import read_stage
from tagllm.train import checkpoint
from tagllm.train.engine import Engine, sharding
from tagllm.train.monitor import Monitor, row_norms
from tagllm.train.placement import placed
from tagllm.train.progress import Progress
from tagllm.train.result import library_of
from tagllm.train.resume import newest_sound
from tagllm.train.signals import EXIT_NOTHING_DONE, EXIT_STOPPED, StopAsked, Stopped, StopRequest
from tagllm.train.step import Step, Stepper
from tagllm.train.validation import Validation
from tagllm.unusual import unusual


def train(config: RunConfig, where: str, stop: StopRequest) -> Path:
    """Trains the learned tags of a config and leaves a run folder with their library; goes on where a run stopped.

    Raises:
        UserError: any mistake in config, data, libraries or folder; on every rank.
        Stopped: SIGTERM or SIGUSR1 came; the state is saved.
        LostContact: another rank died, hangs or is cut off; the newest checkpoint is where to go on from.
    """
    stage = read_stage(config, where)
    ranks = Ranks.start(config.engine.timeout_s)
    trainer: Trainer | None = None

    def here() -> str:
        return trainer.where() if trainer else f"rank {ranks.rank} before the first step (start the same command again)"

    run = RunFolder(Path(config.output))
    with ExitStack() as held, in_contact(ranks.silent, here):

        def claim() -> RunConfig:
            held.enter_context(RunLock(run.path))
            return run.claim(config, partial(fastest_dtype, ranks.device))

        ranks.on_rank_zero(lambda: check_world(config, ranks.size, where))  # told once
        if config.engine.zero_stage == "auto" and ranks.size > 1:
            config, why = ranks.on_rank_zero(lambda: placed(stage, ranks), long=True)
            stage = read_stage(config, where)
            if ranks.rank == 0:
                print(f"placement {why}", flush=True)
        config = ranks.on_rank_zero(claim)
        built = build(stage._replace(config=config), ranks, sharding(config.optim, config.engine, ranks))
        held_out: list[Split] = ["valid", "test"]
        ranks.on_rank_zero(lambda: refuse_trained_on(stage, built.data, stage.knowing, held_out))
        trainer = Trainer(built, Engine(built.model, config.optim, config.engine, ranks), ranks, run, stop)
        trainer.run_to_the_end()
    return run.path


class Trainer:
    """Holds what the loop needs; `run_to_the_end` is the story."""

    def __init__(self, built: Built, engine: Engine, ranks: Ranks, run: RunFolder, stop: StopRequest) -> None:
        self.built, self.engine, self.ranks, self.run, self.stop = built, engine, ranks, run, stop
        self.config = built.config
        self.stepper = Stepper(built, engine, ranks, stop)
        self.validation = Validation(built, engine, ranks, stop)
        self.total = self.stepper.total
        self.progress, self.best = Progress(), dict[str, Tensor]()
        self.at, self.first = 0, 0
        """Steps done, and done when this process began."""

    def where(self) -> str:
        saved = sorted(path.name for path in self.run.checkpoints.glob("step-*"))
        newest = f"the newest checkpoint is {saved[-1]}" if saved else "nothing is saved yet"
        return f"rank {self.ranks.rank} in step {self.at + 1} ({newest}; start the same command again)"

    def run_to_the_end(self) -> None:
        self.at = self.first = self._resume()
        if self.progress.done and self.ranks.on_rank_zero(lambda: self.run.is_finished):
            if self.ranks.rank == 0:
                print(f"finished before: {self.run.library}; to train anew give another output=FOLDER", flush=True)
            return
        with self._recorded() as self.monitor:
            self.stop.training = True
            self.monitor.say(f"device: {hardware()}; ranks: {self.ranks.size}")
            if self.first:
                self.monitor.say(f"going on from step {self.first} of {self.total}")
            for line in [*self.built.data.told(), *unusual(self.built.stage)]:
                self.monitor.say(line)
            try:
                self._train()
                if self.at > self.first:
                    self._save()  # what follows takes minutes on many rows, and may fail
                self._finish()
            except StopAsked:
                self._leave()

    def _recorded(self) -> Monitor:
        """Writes what this run is and opens its log; where rank 0 cannot, all ranks end."""
        monitor = Monitor(self.run.path, self.total, self.first, silent=True)

        def open_log() -> None:
            nonlocal monitor
            with writing(self.run.path):
                self.run.record(self.config, self.built.data, self.ranks.size, loaded_digest(self.built.stage))
                monitor = Monitor(self.run.path, self.total, self.first, silent=False)

        self.ranks.on_rank_zero(open_log)
        return monitor

    def _train(self) -> None:
        if self.at == 0:
            self.validation.scale_heads()
        if self._evaluation_due():  # a stop came in the middle of it
            self._evaluate()
        while self.at < self.total and not self._out_of_patience():
            started = time.monotonic()
            done = self.stepper.take(self.at)
            self.at += 1
            self._account(done)
            self._log(done, time.monotonic() - started)
            if self._evaluation_due():
                self._evaluate()
            if done.stop_asked:
                raise StopAsked
            if self.at % self.config.checkpoint.every_steps == 0 and self.at < self.total:
                self._save()

    def _account(self, done: Step) -> None:
        """Counts steps that were skipped. After too many of them training ends."""
        if done.finite:
            self.progress = self.progress._replace(skipped_in_a_row=0)
            return
        before = self.progress
        in_a_row = before.skipped_in_a_row + 1
        self.progress = before._replace(skipped=before.skipped + 1, skipped_in_a_row=in_a_row)
        what = f"step {self.at}: the loss is {done.loss}, the norm of the gradient {done.gradient_norm}"
        self.monitor.say(f"warning: {what}; nothing was updated in this step")
        if in_a_row >= self.config.optim.skipped_in_a_row:
            raise SharedError(
                f"{what}, as in the {in_a_row - 1} steps before; none of them was applied. Lower optim.tag_lr (it is "
                f"{self.config.optim.tag_lr}) or optim.head_lr, or look for extreme targets. Rows: "
                f"{'; '.join(done.suspects)}"
            )

    def _evaluation_due(self) -> bool:
        every = self.config.evaluation.every_steps or max(1, math.ceil(self.total / 4))
        return self.at > self.progress.evaluated and (self.at % every == 0 or self.at == self.total)

    def _evaluate(self) -> None:
        """Scores the validation split and keeps the state that is best there with its heads in closed form: what the
        tags are worth shows then, long before a head that takes small steps follows them. Training goes on, and the
        state is kept, with the heads as they are; the end refits them."""
        held_out, learned = self.validation.held_out(), self.engine.learned()
        seen = self.validation.seen_by_heads() if held_out else {}
        self.progress = self.progress._replace(evaluated=self.at)  # a stop in the passes above: they are due again
        norms = row_norms(self.built.layout, learned)
        if held_out is None:
            self.monitor.log(self.at, norms)
            return
        _, refitted = self.validation.refit_heads(held_out, seen)
        scalars = self.validation.scalars(held_out) | refitted
        self.monitor.log(self.at, scalars | norms)
        self._note_best(self.ranks.on_rank_zero(lambda: refitted["valid/loss_refitted"]), learned)
        shown = "  ".join(f"{name.removeprefix('valid/')} {value:.4f}" for name, value in scalars.items())
        mark = "  *" if self.progress.best_step == self.at else ""
        self.monitor.say(f"step {self.at}/{self.total}  validation: {shown}{mark}")

    def _note_best(self, loss: float, learned: dict[str, Tensor]) -> None:
        if loss < self.progress.best_loss:
            self.progress = self.progress._replace(best_loss=loss, best_step=self.at, worse_in_a_row=0)
            self.best = learned
        else:
            self.progress = self.progress._replace(worse_in_a_row=self.progress.worse_in_a_row + 1)

    def _out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.worse_in_a_row >= patience

    def _finish(self) -> None:
        """Last and best states become libraries; heads are refitted on the best."""
        last = self.engine.learned()
        if self.best:
            self.engine.overwrite(self.best)
        try:
            held_out = self.validation.held_out(probing=True)
            seen = self.validation.seen_by_heads(FIT_ROWS, probing=True)
            self.built.model.forget()  # as large as the fit, and that was the last pass
            heads, scalars = self.validation.refit_heads(held_out, seen)
            result, probes = self.engine.learned(), self.validation.probes(seen, held_out)
        except StopAsked:
            self.engine.overwrite(last)
            raise
        self.monitor.log(self.at, scalars)
        about = {"steps": self.at, "best_step": self.progress.best_step, **scalars}
        peaks = self.ranks.sum_each(peak_memory_gib())
        self.monitor.log(self.at, {f"memory/{name}_all_ranks": peak for name, peak in peaks.items()})

        def save() -> None:
            with writing(self.run.library):
                for split, probe in probes.items():
                    probe.save(self.run.probe(split))
                library_of(self.built, last, {}, about).save(self.run.last)
                library_of(self.built, result, heads, about).save(self.run.library)

        self.ranks.on_rank_zero(save)
        self.engine.overwrite(last)
        self.progress = self.progress._replace(done=True)
        if failure := self._save():
            raise SharedError(f"the library is written, the end of the run is not recorded: {failure}")
        if told := fields_alone(heads):
            self.monitor.say(told)
        self.monitor.say(f"library: {self.run.library}")

    def _log(self, done: Step, seconds: float) -> None:
        memory, optim = self.built.model.memory, self.config.optim
        scalars = {
            **done.scalars(), **done.work.scalars(seconds),
            "train/tag_lr": optim.tag_lr * done.lr_factor, "train/head_lr": optim.head_lr * done.lr_factor,
            "train/skipped_steps": float(self.progress.skipped),
            "speed/seconds": seconds, "speed/rows_per_second": optim.rows_per_step / seconds,
            "speed/prefix_hit_ratio": memory.hits / max(memory.lookups, 1) if memory else math.nan,
            **{f"memory/{name}_rank0": peak for name, peak in peak_memory_gib().items()},
        }  # fmt: skip
        self.monitor.log(self.at, scalars)

    def _leave(self) -> None:
        """Saves, and ends this process.

        Raises:
            Stopped: always, unless
            UserError: the save failed.
        """
        if failure := self._save():
            raise SharedError(f"stopped at step {self.at}, which is not saved: {failure}")
        told = f"stopped after step {self.at} of {self.total}; the state is saved. Start the same command again."
        raise Stopped(told, EXIT_STOPPED if self.at > self.first else EXIT_NOTHING_DONE)

    def _save(self) -> str:
        """A checkpoint of the steps done. A save that fails warns, says why, and training goes on."""
        tensors = self.engine.state() | {f"best.{name}": value for name, value in self.best.items()}
        tensors |= self.built.model.head_scales()
        state = checkpoint.TrainState(self.at, tensors, self.progress._asdict(), self.built.identity())

        def write() -> str:
            try:
                checkpoint.save(self.run.checkpoints, state, self.config.checkpoint.keep)
            except checkpoint.SaveFailed as error:
                return str(error)
            return ""

        failure = self.ranks.on_rank_zero(write)
        if failure:
            self.monitor.say(f"warning: {failure}")
        return failure

    def _resume(self) -> int:
        """Restores the newest sound checkpoint; returns the step to go on from (0: a fresh start)."""
        state = self.ranks.on_rank_zero(partial(newest_sound, self.run.checkpoints, self.built.identity()))
        if state is None:
            return 0
        self.best = {n.removeprefix("best."): t for n, t in state.tensors.items() if n.startswith("best.")}
        self.progress = Progress(**state.progress)
        learned = {n: t for n, t in state.tensors.items() if not n.startswith("best.")}
        self.built.model.set_head_scales(learned)
        self.engine.restore(learned, state.step - self.progress.skipped)
        return state.step
