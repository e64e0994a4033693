"""Trains one adapter and its head for so many seconds. The rows, their order, micro-batches, schedule and clipping are
those of the run.

n rows, F features, K head outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tagllm.arrays import Floats
from tagllm.baselines.adapt import Adapted
from tagllm.baselines.methods import Method
from tagllm.baselines.prompts import Row, alike, pad
from tagllm.baselines.task import Task
from tagllm.config import OptimConfig
from tagllm.evaluate.choosing import clearly_better
from tagllm.evaluate.closed_form import fit_head, predictions_of, squared_errors
from tagllm.evaluate.features import Features
from tagllm.head import Head
from tagllm.model.loss import value_losses
from tagllm.train.placement import host_memory
from tagllm.train.rows import StepRows
from tagllm.train.schedule import lr_factor, total_steps
from tagllm.train.validation import SCALE_ROWS, SOME_ROWS

MOST_EPOCHS = 4
"""Times those of the run: more would only overfit what time is left over."""
WARM_UP, MEASURED = 1, 3
"""Steps that are not timed, and after how many more the length of the run is known."""
SAVED_BYTES = 60
"""Kept for backward for each token, layer and unit of the hidden state, at most (SmolLM2 under LoRA: 55 in fp32)."""
CACHED_BYTES = 8
"""Of keys and values for each token, layer and unit of the hidden state, at most."""
SHARE = 3
"""Of the memory that is no weights, the part that either may take: another process may run beside."""
LOOKS = 4
"""At the validation split, the end among them; each costs a pass over the training rows too."""


class Trained(NamedTuple):
    """`valid_loss`: squared error of standardised targets, or nats of classes, of the best state, its head refitted.
    `seconds` of all steps; validation and refit come on top."""

    valid_loss: float
    best_step: int
    refitted: bool
    steps: int
    rows: int
    skipped: int
    seconds: float
    trainable_parameters: int


class Look(NamedTuple):
    """The head as it is to be used after so many steps, whether it is the closed-form fit, its loss on validation."""

    head: Head
    refitted: bool
    loss: float


class Clock:
    """How many steps there will be: what is done, and what fits into the rest at the pace so far."""

    def __init__(self, budget_s: float, most_steps: int) -> None:
        self.budget_s, self.most_steps = budget_s, most_steps
        self.seconds: list[float] = []

    def total(self) -> int:
        at, timed = len(self.seconds), self.seconds[WARM_UP:]
        left = self.budget_s - sum(self.seconds)
        if left <= 0:
            return max(at, 1)
        if len(timed) < MEASURED:
            return self.most_steps
        return min(self.most_steps, at + int(left / (sum(timed) / len(timed))))


def train(
    model: Adapted,
    task: Task,
    method: Method,
    rate: float,
    budget_s: float,
    seed: int,
    fit_rows: int,
    looks: int = LOOKS,
) -> tuple[Trained, Head]:
    """Leaves `model` in the state that is best on validation with its head refitted, which comes with it; so many
    `looks` are taken, at fits of SOME_ROWS at most, and its own sees `fit_rows` training rows at most."""
    config, untagged = task.config, task.untagged(method)
    valid, optim = task.rows("valid", method), config.optim
    rows = StepRows(config.model_copy(update={"seed": seed}), task.data.splits["train"], 0, 1)
    optimizer = torch.optim.AdamW(model.groups(rate, optim.head_lr), betas=optim.betas, weight_decay=0.0)
    steps_of_run = total_steps(optim, rows.rows_per_epoch)
    clock, most_tokens = Clock(budget_s, MOST_EPOCHS * steps_of_run), tokens_in_memory(model, SAVED_BYTES)
    scale_head(model, task, method)

    def look(limit: int) -> Look:
        return refit(model, task, method, see(model, valid, config.evaluation.rows_per_batch), limit)

    some = min(fit_rows, SOME_ROWS)
    saw_all = some == fit_rows or some >= sum(map(len, task.data.splits["train"]))
    best_look, best_step, best, skipped, evaluated = None, 0, model.learned(), 0, 0
    while (at := len(clock.seconds)) < (total := clock.total()):
        began = time.perf_counter()
        batches = [[untagged(example) for example in batch] for batch in rows.micro_batches(at)]
        factor = lr_factor(_warming_up(optim, total, steps_of_run), at, total)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        skipped += not step(
            model, optimizer, [few for rows in batches for few in in_room(rows, most_tokens)], optim.clip
        )
        clock.seconds.append(time.perf_counter() - began)
        done, total = at + 1, clock.total()
        if done < total and done * looks >= (evaluated + 1) * total:
            evaluated = done * looks // total
            looked = look(some)
            if best_look is None or looked.loss < best_look.loss:
                best_look, best_step, best = looked, done, model.learned()
    steps, last = len(clock.seconds), look(some if best_look else fit_rows)
    if best_look and best_look.loss < last.loss:
        model.overwrite(best)
        last = best_look
    else:
        best_step = steps
    if best_look and not saw_all:  # all looks are compared by fits of as many rows
        last = look(fit_rows)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows_seen, seconds = steps * optim.rows_per_step, sum(clock.seconds)
    return Trained(last.loss, best_step, last.refitted, steps, rows_seen, skipped, seconds, learns), last.head


def tokens_in_memory(model: Adapted, bytes_each: int) -> int:
    """How many tokens a pass may see that keeps so many bytes of each, for each layer and unit: the run's own, which
    sees the live part alone, may take larger micro-batches than whole prompts with padding leave room for."""
    sizes, device = model.adapted.config.get_text_config(), next(model.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = host_memory() - sum(p.nbytes for p in model.parameters())
    return int(free / SHARE / (bytes_each * sizes.num_hidden_layers * sizes.hidden_size))


def in_room(rows: Sequence[Row], most_tokens: int) -> list[list[Row]]:
    """A micro-batch in pieces of so many tokens with their padding, or of one row."""
    pieces: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if pieces and longest * (len(pieces[-1]) + 1) <= most_tokens:
            pieces[-1].append(row)
        else:
            longest = len(row.ids)
            pieces.append([row])
    return pieces


def _warming_up(optim: OptimConfig, total: int, steps_of_run: int) -> OptimConfig:
    """For the same share of the steps as in the run: a short training would not get beyond it."""
    return optim.model_copy(update={"warmup_steps": round(optim.warmup_steps * total / steps_of_run)})


def step(
    model: Adapted, optimizer: torch.optim.Optimizer, batches: Sequence[Sequence[Row]], clip: float | None
) -> bool:
    """Forward, backward and update. False (and no update) where the gradient is not finite.

    The loss is the sum of squared errors or nats over all rows, divided by their number, as in the run.
    """
    count = sum(len(row.target) for batch in batches for row in batch)
    num_classes = len(model.head.spec.classes or [])
    for rows in batches:
        batch = _moved(pad(rows), model)
        values_BK = model.head(*model(batch))
        losses_BK = value_losses(values_BK, model.head.standardise(batch.target_BK), num_classes)
        (losses_BK.sum() / count).backward()
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    finite = bool(nn.utils.clip_grad_norm_(learned, clip or math.inf).isfinite())
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return finite


@torch.no_grad()
def see(model: Adapted, rows: Sequence[Row], rows_per_batch: int) -> Features:
    """One pass over rows; results in their order. What rows of a batch begin with (a protein, of which many drugs are
    asked) is computed once: the tag's own passes remember it, too."""
    order, parts = list[int](), []
    for chosen, shared in alike(rows, rows_per_batch, tokens_in_memory(model, CACHED_BYTES)):
        batch = _moved(pad([rows[i] for i in chosen]), model)
        parts.append(Features(*(tensor.cpu().numpy() for tensor in (*model(batch, shared), batch.target_BK))))
        order += chosen
    back = np.argsort(order)
    return Features(*(column[back] for column in Features.together(parts)))


def errors(head: Head, seen: Features) -> Floats:
    """Of each row (n): squared, standardised, averaged over outputs; of classes, nats."""
    features_nF, targets_nK = seen.rows(head.spec.reads)
    answers_nK = predictions_of(head, features_nF)
    errors_n: Floats
    if head.spec.classes:
        logits_nK, target_n1 = torch.from_numpy(answers_nK), torch.from_numpy(targets_nK)
        nats_n = value_losses(logits_nK, target_n1, len(head.spec.classes))[:, 0].numpy()
        errors_n = np.nan_to_num(nats_n, nan=np.inf, posinf=np.inf)  # or the first rate that diverges would stay best
    else:
        errors_n = squared_errors(head, answers_nK, targets_nK) / np.float32(head.spec.outputs)
    return errors_n


def scale_head(model: Adapted, task: Task, method: Method) -> None:
    """Tells the head (which is zero) the scale of the means it reads, as the run does."""
    if model.head.spec.reads != "last":
        rows = task.rows("train", method, SCALE_ROWS)
        means_nD = see(model, rows, task.config.evaluation.rows_per_batch).mean_nD
        model.head.set_scale_of(torch.from_numpy(means_nD))


def refit(model: Adapted, task: Task, method: Method, valid: Features, limit: int) -> Look:
    """The head is fitted in closed form on `limit` training rows, unless the trained one is clearly better on
    validation, as the run does (classes have no closed form). The model stays as it is."""
    trained = model.head.as_head()
    before = errors(trained, valid)
    if trained.spec.classes or not trained.spec.refit:
        return Look(trained, False, float(before.mean()))
    train = see(model, task.rows("train", method, limit), task.config.evaluation.rows_per_batch)
    fit = fit_head(task.head, train.rows(trained.spec.reads), valid.rows(trained.spec.reads))
    after = errors(fit, valid)
    if clearly_better(before, after):
        return Look(trained, False, float(before.mean()))
    return Look(fit, True, float(after.mean()))


def _moved(batch: Any, model: Adapted) -> Any:
    device = model.head.bias_K.device
    return type(batch)(*(tensor.to(device) for tensor in batch))
