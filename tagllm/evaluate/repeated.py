"""Held-out rows of a head that ask what a training row asks: a split by something else than all fields may leave some,
and right answers to them may be remembered.

n rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagllm.build import Built
from tagllm.config import FieldConfig, Split
from tagllm.evaluate.metrics import intervals, value_metrics
from tagllm.evaluate.passes import Pass
from tagllm.evaluate.scoring import by_head
from tagllm.template import behind_one_tag, unbroken, written


def repeated_rows(built: Built, split: Split) -> NDArray[np.bool_]:
    """Which rows of a pass over the whole split (n) have, in the same prompt, all fields of a training row."""
    known = {*_asked(built, "train")}
    return np.array([asked in known for asked in _asked(built, split)], bool)


def without_repeated(built: Built, split: Split, held_out: Pass) -> dict[str, Any]:
    """How many rows are `repeated`, and `metrics` and `intervals` of the others; empty where none or all are."""
    again_n = repeated_rows(built, split)
    if again_n.all() or not again_n.any():
        return {}
    nothing = np.full_like(held_out.targets_nK, np.nan)
    others = held_out._replace(targets_nK=np.where(again_n[:, None], nothing, held_out.targets_nK))
    return {
        "repeated": int(again_n.sum()),
        "metrics": by_head(built, split, others, value_metrics),
        "intervals": by_head(built, split, others, intervals),
    }


def _asked(built: Built, split: Split) -> Iterator[int]:
    """A number for what each row asks, in the order of a pass: for the text that its prompt shows."""
    sources, heads = built.stage.config.data.sources, built.layout.heads
    for rows, template, source in zip(built.examples(split), built.stage.templates, sources, strict=True):
        columns = rows.columns(template.fields)
        texts = {name: _shown(values, source.fields.get(name, FieldConfig())) for name, values in columns.items()}
        symmetric = any(heads[tag].symmetric for tag in template.tags if tag in heads)
        for names in behind_one_tag(template, built.layout.kinds) if symmetric else []:
            texts |= _in_own_order({name: texts[name] for name in names})
        for asked in zip(*(texts.values() or [[""] * len(rows)]), strict=True):
            yield hash((template.text, *asked))


def _in_own_order(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Columns whose values may trade places, with those of each row in alphabetical order."""
    rows = [sorted(row) for row in zip(*texts.values(), strict=True)]
    return {name: [row[at] for row in rows] for at, name in enumerate(texts)}


def _shown(values: Sequence[Any], field: FieldConfig) -> list[str]:
    return [unbroken(written(value, field), field) for value in values]


def note_of(found: dict[str, Any]) -> str:
    """For people."""
    return f"{found['repeated']:,} rows ask what a training row asks." if found else ""
