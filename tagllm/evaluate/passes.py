"""One pass over examples without a gradient: losses, head values, features. Spread over the ranks, results on all.

n rows, K head outputs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagllm.arrays import Floats
from tagllm.config import HeadConfig
from tagllm.data.batch import Batch, Counts, count, in_chunks
from tagllm.data.collate import Collator, no_batch
from tagllm.data.encode import Example
from tagllm.data.examples import Examples
from tagllm.data.sampler import Draw
from tagllm.errors import SharedError
from tagllm.evaluate.choosing import Rows
from tagllm.evaluate.closed_form import predictions_of, squared_errors
from tagllm.evaluate.features import Features
from tagllm.head import Head
from tagllm.model.loss import LossWeights
from tagllm.model.tagged import Output
from tagllm.ranks import Ranks

Forward = Callable[[Batch], Output]
Part = tuple[list[int], list[Floats]]
"""Which draws, and their columns."""
GATHERED_AT_ONCE = 1 << 28
"""Bytes of all ranks together, which NCCL has on every GPU while they are sent, beside the backbone and all else."""


class Pass(NamedTuple):
    """Rows in the order of the draws. Features are empty (n, 0) unless asked for."""

    sums: tuple[float, float, float]
    counts: Counts
    values_nK: Floats
    targets_nK: Floats
    last_nD: Floats
    mean_nD: Floats
    prefix_last_nD: Floats

    def loss(self, weights: LossWeights) -> float:
        return weights.of(self.sums, self.counts)

    def rows(self, spec: HeadConfig) -> Rows:
        """What a head is fitted on."""
        return Features(self.last_nD, self.mean_nD, self.targets_nK[:, : spec.outputs]).rows(spec.reads)

    def errors(self, head: Head) -> Floats:
        """Of each row, as `squared_errors`."""
        return squared_errors(head, self.values_nK[:, : head.spec.outputs], self.targets_nK[:, : head.spec.outputs])

    def answered_by(self, head: Head, mine_n: NDArray[np.bool_]) -> Pass:
        """The same with some rows answered by another head, from what was kept of features."""
        values_nK = self.values_nK.copy()
        values_nK[mine_n, : head.spec.outputs] = predictions_of(head, self.rows(head.spec).features_nF[mine_n])
        answered = self._replace(values_nK=values_nK)
        before, after = (float(one.errors(head)[mine_n].sum(dtype=np.float64)) for one in (self, answered))
        span, output, value = self.sums
        of_others = value - before if np.isfinite(self.targets_nK[~mine_n]).any() else 0.0  # `before` may be infinite
        return answered._replace(sums=(span, output, of_others + after))


def run_over(
    forward: Forward,
    sources: Sequence[Examples],
    draws: Sequence[Draw],
    collate: Collator,
    ranks: Ranks,
    rows_per_batch: int,
    features: bool = False,
) -> Pass:
    """Every rank takes its own rows (the home rank of training, so remembered prefixes are met again) and equally many
    batches; a rank with fewer repeats one and drops the result."""
    homes = [sources[draw.source].home(draw.row) for draw in draws]
    mine = [i for i, home in enumerate(homes) if home % ranks.size == ranks.rank]
    examples = {i: sources[draws[i].source][draws[i].row] for i in mine}
    batches = [[mine[k] for k in chunk] for chunk in in_chunks([examples[i] for i in mine], rows_per_batch)]
    num_batches = max(ranks.gather(len(batches)))
    sums, counts = np.zeros(3), np.zeros(3, int)
    parts = list[Part]()
    filler, problems = _filler(sources), list[str]()
    for at in range(num_batches):
        if at >= len(batches):
            forward(collate([filler]))
            continue
        chosen = batches[at]
        try:
            batch = collate([examples[i] for i in chosen])
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for this rank
            told = no_batch(collate, [examples[i] for i in chosen], error)
            problems += [f"{told}. Mend or remove the row, then start again."]
            forward(collate([filler]))
            continue
        output = forward(batch)
        sums += [float(term) for term in output.sums]
        counts += count(batch)
        parts.append((chosen, _columns(output, batch, features)))
    if found := [text for texts in ranks.gather(problems) for text in texts]:
        raise SharedError(*found)
    everything = gathered(parts, ranks)
    total = ranks.sum([*sums, *counts])
    columns = _in_order(everything, len(draws))
    return Pass((total[0], total[1], total[2]), Counts(*(int(n) for n in total[3:])), *columns)


def _filler(sources: Sequence[Examples]) -> Example:
    return next(examples[0] for examples in sources if len(examples))


def _columns(output: Output, batch: Batch, features: bool) -> list[Floats]:
    kept = [output.values_BK, batch.target_BK]
    wanted = [output.last_BD, output.mean_BD, output.prefix_last_BD]
    kept += wanted if features else [tensor[:, :0] for tensor in wanted]
    return [tensor.detach().float().cpu().numpy() for tensor in kept]


def gathered(mine: Sequence[Part], ranks: Ranks) -> list[Part]:
    """The parts of all ranks, as many at a time as `GATHERED_AT_ONCE` has room for."""
    num_bytes = sum(column.nbytes for _, columns in mine for column in columns)
    nums_parts, nums_bytes = zip(*ranks.gather((len(mine), num_bytes)), strict=True)
    times = max(1, ceil(ranks.size * max(nums_bytes) / GATHERED_AT_ONCE))
    step = max(1, max(nums_parts) // times)
    turns = [ranks.gather(mine[at : at + step]) for at in range(0, max(nums_parts), step)]
    return [part for turn in turns for one in turn for part in one]


def _in_order(parts: Sequence[Part], n: int) -> list[Floats]:
    columns = []
    for at in range(5):
        width = parts[0][1][at].shape[1]
        column = np.zeros((n, width), np.float32)
        for chosen, values in parts:
            column[chosen] = values[at]
        columns.append(column)
    return columns
