"""The one training loop. A stage is data: which tags are learned, which rows, which loss terms."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tagllm.config import RunConfig
from tagllm.data.batch import Counts, count
from tagllm.data.encode import Example
from tagllm.errors import UserError
from tagllm.files import RunLock
from tagllm.model.loss import total
from tagllm.stage import check_world, read_stage
from tagllm.train import checkpoint
from tagllm.train.build import Built, build
from tagllm.train.engine import Engine, sharding
from tagllm.train.gradient_free import GradientFree
from tagllm.train.monitor import Monitor, peak_memory_gib
from tagllm.train.placement import placed
from tagllm.train.ranks import Ranks, in_contact
from tagllm.train.result import library_of
from tagllm.train.rows import StepRows
from tagllm.train.run_folder import RunFolder
from tagllm.train.schedule import lr_factor, total_steps
from tagllm.train.signals import Stopped, StopRequest
from tagllm.train.work import Work, work_of


class Step(NamedTuple):
    """What one optimizer step did, over all ranks."""

    loss: float
    sums: list[float]
    counts: Counts
    gradient_norm: float
    work: Work

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Progress(NamedTuple):
    """Where a run stands; goes into every checkpoint."""

    best_loss: float = math.inf
    best_step: int = -1
    worse_in_a_row: int = 0
    done: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0


def train(config: RunConfig, where: str) -> Path:
    """Trains the learned tags of a config and leaves a run folder with their library; goes on where a run stopped.

    Raises:
        UserError: any mistake in config, data, libraries or folder; on every rank.
        Stopped: SIGTERM or SIGUSR1 came; the state is saved.
        LostContact: another rank died, hangs or is cut off; the newest checkpoint is where to go on from.
    """
    stage = read_stage(config, where)
    ranks = Ranks.start(config.engine.timeout_s)
    ranks.on_rank_zero(lambda: check_world(config, ranks.size, where))  # told once
    if config.engine.zero_stage == "auto" and ranks.size > 1:
        config, why = ranks.on_rank_zero(lambda: placed(stage, ranks))
        stage = read_stage(config, where)
        if ranks.rank == 0:
            print(f"placement {why}", flush=True)
    run = RunFolder(Path(config.output))
    lock = RunLock(run.path)
    with StopRequest() as stop:

        def claim() -> None:
            lock.__enter__()
            run.claim(config)

        try:
            ranks.on_rank_zero(claim)
            built = build(stage, ranks, sharding(config.optim, config.engine, ranks))
            ranks.on_rank_zero(lambda: run.record(built.data))
            engine = Engine(built.model, config.optim, config.engine, ranks)
            trainer = Trainer(built, engine, ranks, run, stop)
            with in_contact(trainer.where):
                trainer.run_to_the_end()
        finally:
            lock.release()
    return run.path


class Trainer:
    """Holds what the loop needs; `run_to_the_end` is the story."""

    def __init__(self, built: Built, engine: Engine, ranks: Ranks, run: RunFolder, stop: StopRequest) -> None:
        self.built, self.engine, self.ranks, self.run, self.stop = built, engine, ranks, run, stop
        self.config, self.collate = built.config, built.collator()
        self.gradient_free = GradientFree(built, engine, ranks)
        self.rows = StepRows(self.config, built.examples("train"), ranks.rank, ranks.size)
        self.total = total_steps(self.config.optim, self.rows.rows_per_epoch)
        self.progress, self.best, self.at = Progress(), dict[str, Tensor](), 0

    def where(self) -> str:
        saved = sorted(path.name for path in self.run.checkpoints.glob("step-*"))
        newest = f"the newest checkpoint is {saved[-1]}" if saved else "nothing is saved yet"
        return f"rank {self.ranks.rank} in step {self.at + 1} ({newest}; start the same command again)"

    def run_to_the_end(self) -> None:
        first = self._resume()
        if self.progress.done:
            return
        every = self.config.evaluation.every_steps or max(1, math.ceil(self.total / 4))
        with Monitor(self.run.path, self.total, first, self.ranks.rank > 0) as self.monitor:
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
                due = step % self.config.checkpoint.every_steps == 0 or self._stop_asked()
                if due and step < self.total:
                    self._save(step)
            self._finish(step)

    def train_step(self, step: int) -> Step:
        """Rows -> micro-batches -> counts over all ranks -> backward each -> one optimizer step, or none if a number is
        not finite."""
        self.at = step
        chunks = self.rows.micro_batches(step)
        batches = [self.collate(chunk) for chunk in chunks]
        counts = Counts(*(int(n) for n in self.ranks.sum(_added([count(batch) for batch in batches]))))
        sums, suspects = [0.0, 0.0, 0.0], list[Example]()
        for batch, chunk in zip(batches, chunks, strict=True):
            output = self.engine(batch)
            self.engine.backward(total(output.sums, counts, self.built.stage.weights))
            found = [float(term.detach()) for term in output.sums]
            sums = [a + b for a, b in zip(sums, found, strict=True)]
            suspects += [] if all(map(math.isfinite, found)) else chunk
        work = work_of(batches, self.built.model.take_computed())
        totals = self.ranks.sum([*sums, *work])
        sums, work = totals[: len(sums)], Work(*totals[len(sums) :])
        loss = sum(w * s / c for w, s, c in zip(self.built.stage.weights, sums, counts, strict=True) if c)
        done = Step(loss, sums, counts, self.engine.gradient_norm(), work)
        if done.finite:
            self.engine.step(lr_factor(self.config.optim, step, self.total))
            self.progress = self.progress._replace(skipped_in_a_row=0)
        else:
            self._skip(step, done, suspects or [example for chunk in chunks for example in chunk])
        return done

    def _skip(self, step: int, done: Step, suspects: list[Example]) -> None:
        """Leaves everything as it was before the step. After too many of them training ends."""
        self.engine.skip()
        before = self.progress
        in_a_row = before.skipped_in_a_row + 1
        self.progress = before._replace(skipped=before.skipped + 1, skipped_in_a_row=in_a_row)
        what = f"step {step + 1}: the loss is {done.loss}, the norm of the gradient {done.gradient_norm}"
        self.monitor.say(f"warning: {what}; nothing was updated in this step")
        if in_a_row < self.config.optim.skipped_in_a_row:
            return
        prompts = [self.built.prompt_of(example) for example in suspects[:2]]
        of_ranks = [text for texts in self.ranks.gather(prompts) for text in texts]
        raise UserError(
            f"{what}, as in the {in_a_row - 1} steps before; none of them was applied. Lower optim.tag_lr (it is "
            f"{self.config.optim.tag_lr}) or optim.head_lr, or look for extreme targets. Rows: {'; '.join(of_ranks)}"
        )

    def _evaluate(self, step: int) -> None:
        """Scores the validation split and keeps the best state."""
        scalars = self.gradient_free.validate()
        if not scalars:
            return
        self._note_best(step, scalars["valid/loss"])
        self.monitor.log(step, scalars)
        shown = "  ".join(f"{name.removeprefix('valid/')} {value:.4f}" for name, value in scalars.items())
        best = "  *" if self.progress.best_step == step else ""
        self.monitor.say(f"step {step}/{self.total}  held out: {shown}{best}")

    def _note_best(self, step: int, loss: float) -> None:
        learned = self.engine.learned()
        if loss < self.progress.best_loss:
            self.progress = self.progress._replace(best_loss=loss, best_step=step, worse_in_a_row=0)
            self.best = learned
        else:
            self.progress = self.progress._replace(worse_in_a_row=self.progress.worse_in_a_row + 1)

    def _out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.worse_in_a_row >= patience

    def _finish(self, step: int) -> None:
        """Last and best states become libraries; heads are refitted on the best."""
        last = self.engine.learned()
        if self.best:
            self.engine.overwrite(self.best)
        scalars = self.gradient_free.refit_heads()
        self.monitor.log(step, scalars)
        result = self.engine.learned()
        about = {"steps": step, "best_step": self.progress.best_step, **scalars}
        peak = self.ranks.sum([peak_memory_gib()])[0]
        self.monitor.log(step, {"memory/peak_gib_all_ranks": peak})

        probe = self.gradient_free.probe()

        def save() -> None:
            if probe is not None:
                probe.save(self.run.probe)
            library_of(self.built, last, about).save(self.run.last)
            library_of(self.built, result, about).save(self.run.library)

        self.ranks.on_rank_zero(save)
        self.engine.overwrite(last)
        self.progress = self.progress._replace(done=True)
        self._save(step, final=True)
        self.monitor.say(f"library: {self.run.library}")

    def _log(self, step: int, done: Step, seconds: float) -> None:
        memory = self.built.model.memory
        names = ("span_nats", "output_nats", "value_loss")
        terms = {f"train/{k}": s / c for k, s, c in zip(names, done.sums, done.counts, strict=True) if c}
        self.monitor.log(
            step,
            {
                "train/loss": done.loss, **terms, "train/gradient_norm": done.gradient_norm,
                "train/lr_factor": lr_factor(self.config.optim, step - 1, self.total),
                "train/skipped_steps": float(self.progress.skipped),
                "speed/seconds": seconds, "speed/rows_per_second": self.config.optim.rows_per_step / seconds,
                "speed/prefix_hit_ratio": memory.hits / max(memory.lookups, 1) if memory else math.nan,
                **done.work.scalars(seconds), "memory/peak_gib_rank0": peak_memory_gib(),
            },
        )  # fmt: skip

    def _stop_asked(self) -> bool:
        """A signal to any one rank stops all of them after the same step."""
        return self.ranks.sum([float(self.stop.requested)])[0] > 0

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
        learned = {n: t for n, t in state.tensors.items() if not n.startswith("best.")}
        self.engine.restore(learned, state.step - self.progress.skipped)
        return state.step


def _added(counts: list[Counts]) -> list[float]:
    return [float(sum(column)) for column in zip(*counts, strict=True)]
