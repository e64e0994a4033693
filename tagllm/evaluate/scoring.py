"""A pass over the rows of one split: with the tags as they are, or with other rows in the place of some."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from tagllm.arrays import Floats
from tagllm.build import Built, build_on, empty_memory
from tagllm.config import Split
from tagllm.data.sampler import Draw
from tagllm.evaluate.metrics import value_metrics
from tagllm.evaluate.passes import Pass, run_over
from tagllm.model.loss import nats_per_token
from tagllm.ranks import Ranks
from tagllm.tags import Tag

T = TypeVar("T")
Measure = Callable[[Floats, Floats, bool, Sequence[str]], dict[str, T]]


class Evaluation(NamedTuple):
    """What the parts of an evaluation share."""

    built: Built
    ranks: Ranks
    split: Split


def with_tags(evaluation: Evaluation, tags: dict[str, Tag]) -> Pass:
    """The same rows and prompts with other rows (perhaps none) in the place of some tags."""
    built, ranks, split = evaluation
    stage = built.stage._replace(loaded=built.tags | tags)
    return score_pass(build_on(built.backbone, stage, ranks, [split]), ranks, split)


def score_pass(
    built: Built, ranks: Ranks, split: Split, draws: Sequence[Draw] | None = None, probing: bool = False
) -> Pass:
    """Rows of one split through the model, all of them unless `draws` says which; `probing` keeps what the ridge probes
    read."""
    collate = built.collator()
    collate = collate.probing() if probing else collate._replace(frozen_prefix=True, behind_text=True)
    sources = built.examples(split)
    size = built.config.evaluation.rows_per_batch
    # A prompt is seen once; under the block mask its fields come again in others. Kept for one pass, since the next may
    # be through other tags, and their memory beside this one.
    built.model.memory = empty_memory(built.config, keeps=built.config.mask == "block")
    with torch.no_grad():
        result = run_over(
            lambda batch: built.model(batch.to(ranks.device)), sources, built.draws(split) if draws is None else draws,
            collate, ranks, size, features=probing,
        )  # fmt: skip
    built.model.forget()
    return result


def nats(result: Pass) -> dict[str, float]:
    """Per token of spans and outputs, as perplexity too, and how many tokens that is."""
    found: dict[str, float] = {}
    tokens = {"span_nats": result.counts.span, "output_nats": result.counts.output}
    for name, value in nats_per_token(result.sums, result.counts).items():
        term = name.removesuffix("_nats")
        found |= {name: value, f"{term}_perplexity": math.exp(min(value, 50.0)), f"{term}_tokens": tokens[name]}
    return found


def by_head(built: Built, split: Split, result: Pass, measure: Measure[T]) -> dict[str, T]:
    """What `measure` finds of each head, of values and targets of its own rows, whether it tells classes and the names
    of its targets; with its own name in front (`QED/mse`) where there are several."""
    heads, found = built.layout.heads, dict[str, T]()
    for name, spec in heads.items():
        mine_n, width = built.rows_with(split, name), spec.outputs
        pair = result.values_nK[mine_n, :width], result.targets_nK[mine_n, :width]
        of_head = measure(*pair, bool(spec.classes), built.stage.target_names(name))
        at = f"{name}/" if len(heads) > 1 else ""
        found |= {f"{at}{metric}": value for metric, value in of_head.items()}
    return found


def pass_metrics(evaluation: Evaluation, result: Pass) -> dict[str, float]:
    """Of the tokens and of the values, whichever there are."""
    return nats(result) | by_head(evaluation.built, evaluation.split, result, value_metrics)
