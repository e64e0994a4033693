"""Examples -> padded tensors, cut at the first learned row.

B rows, P prefix positions (left-padded), L live positions (right-padded), N labelled positions, K head outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tagllm.data.encode import Example
from tagllm.template import FIELD, OUTPUT, SPAN


class Batch(NamedTuple):
    """What one micro-batch is to the model. A NamedTuple, since ZeRO-3's hooks walk tuples.

    `label_at_N` are flat positions in B x L whose *next* token is `label_N`, of the term `label_term_N` (SPAN or
    OUTPUT; -1 pads, so that a rank without labels still calls the LM head). `pool_*` marks the field positions that
    `reads: mean` averages. `target_BK` is padded with NaN to the widest head; `head_B` is -1 for rows without one.
    """

    row_B: Tensor
    prefix_ids_BP: Tensor
    prefix_mask_BP: Tensor
    prefix_pool_BP: Tensor
    live_ids_BL: Tensor
    live_mask_BL: Tensor
    live_pool_BL: Tensor
    label_at_N: Tensor
    label_N: Tensor
    label_term_N: Tensor
    read_at_B: Tensor
    head_B: Tensor
    target_BK: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Counts(NamedTuple):
    """How many terms of each loss a batch holds; sums over micro-batches and ranks are the denominators."""

    span: int
    output: int
    value: int


class Collator(NamedTuple):
    """`terms`: the marks whose tokens are labels. `frozen_prefix` False puts every position into the live part.

    `min_prefix` is 1 where any row of the run may have a prefix, so that all ranks run the same modules.
    """

    first_learned_id: int
    terms: tuple[int, ...]
    num_outputs: int
    frozen_prefix: bool = True
    min_prefix: int = 1
    cut_at_function: bool = False
    """Without a gradient any cut is exact; this one gives probes the last state before the function tag."""

    def live_at(self, example: Example) -> int:
        """The first position needed in the live part: the first learned row, the first labelled position, or where the
        head reads."""
        if self.cut_at_function:
            return min([example.function_at, *[example.read_at] * (example.read_at >= 0)])
        if not self.frozen_prefix:
            return 0
        learned = np.flatnonzero(example.ids >= self.first_learned_id)
        labelled = self._label_positions(example)
        last = example.read_at if example.read_at >= 0 else len(example.ids) - 1
        return int(min([last, *learned[:1], *labelled[:1]]))

    def probing(self) -> Collator:
        """For features without a gradient: cut right before the function tag, no labels."""
        return self._replace(terms=(), frozen_prefix=True, min_prefix=1, cut_at_function=True)

    def _label_positions(self, example: Example) -> np.ndarray:
        """Positions whose next token is a label."""
        return np.flatnonzero(np.isin(example.marks[1:], self.terms))

    def __call__(self, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        """Pads and cuts. Positions behind the last one needed are dropped."""
        cuts = [self.live_at(example) for example in examples]
        labels = [self._label_positions(example) for example in examples]
        ends = [
            int(max([example.read_at, *at[-1:]])) + 1 if len(at) or example.read_at >= 0 else len(example.ids)
            for example, at in zip(examples, labels, strict=True)
        ]
        num_prefix = max([self.min_prefix, *cuts])
        num_live = max(end - cut for cut, end in zip(cuts, ends, strict=True))
        size = len(examples)
        prefix = np.zeros((3, size, num_prefix), np.int64)
        live = np.zeros((3, size, num_live), np.int64)
        targets = np.full((size, max(self.num_outputs, 1)), np.nan, np.float32)
        label_at, label, term = [], [], []
        for i, (example, cut, end) in enumerate(zip(examples, cuts, ends, strict=True)):
            pool = np.isin(example.marks, (SPAN, FIELD))
            if cut:
                prefix[:, i, num_prefix - cut :] = example.ids[:cut], np.ones(cut), pool[:cut]
            live[:, i, : end - cut] = example.ids[cut:end], np.ones(end - cut), pool[cut:end]
            label_at.append(i * num_live + labels[i] - cut)
            label.append(example.ids[labels[i] + 1])
            term.append(example.marks[labels[i] + 1])
            targets[i, : len(example.target)] = example.target
        pad = [np.zeros(1, np.int64)] if not sum(map(len, label)) else []
        read_at = [max(example.read_at - cut, 0) for example, cut in zip(examples, cuts, strict=True)]
        prefix_ids_BP, prefix_mask_BP, prefix_pool_BP = torch.from_numpy(prefix)
        live_ids_BL, live_mask_BL, live_pool_BL = torch.from_numpy(live)
        return Batch(
            torch.tensor(rows),
            prefix_ids_BP,
            prefix_mask_BP,
            prefix_pool_BP,
            live_ids_BL,
            live_mask_BL,
            live_pool_BL,
            torch.from_numpy(np.concatenate([*label_at, *pad]).astype(np.int64)),
            torch.from_numpy(np.concatenate([*label, *pad]).astype(np.int64)),
            torch.from_numpy(np.concatenate([*term, *[p - 1 for p in pad]]).astype(np.int64)),
            torch.tensor(read_at),
            torch.tensor([example.head for example in examples]),
            torch.from_numpy(targets),
        )


def count(batch: Batch) -> Counts:
    """Known before any forward, so the reduction over ranks comes first."""
    return Counts(
        int((batch.label_term_N == SPAN).sum()),
        int((batch.label_term_N == OUTPUT).sum()),
        int((~batch.target_BK.isnan()).sum()),
    )
