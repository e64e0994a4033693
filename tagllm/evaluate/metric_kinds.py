"""What each metric is: where it can lie, and which end is the better one."""

from __future__ import annotations

import math
from typing import NamedTuple


class Kind(NamedTuple):
    """`least` and `most`: what it can be at all."""

    higher_is_better: bool = False
    least: float = 0.0
    most: float = math.inf


KINDS = {
    **dict.fromkeys(("mse", "mae"), Kind()),
    "r2": Kind(True, -math.inf, 1.0),
    **dict.fromkeys(("pearson", "spearman"), Kind(True, -1.0, 1.0)),
    **dict.fromkeys(("concordance", "accuracy", "f1", "auroc"), Kind(True, 0.0, 1.0)),
    **dict.fromkeys(("bleu", "chrf++", "spbleu"), Kind(True, 0.0, 100.0)),
    "comet": Kind(True, -math.inf),
    **dict.fromkeys(("exact", "in_language"), Kind(True, 0.0, 1.0)),
    "unparsable": Kind(most=1.0),
    **dict.fromkeys(("cross_entropy", "span_nats", "output_nats"), Kind()),
}
"""Those that tables show, in their order."""


def kind_of(name: str) -> Kind:
    """Of a metric, with the name of its head in front or without; what is in no table is 0 or more."""
    return KINDS.get(without_head(name), Kind())


def without_head(name: str) -> str:
    """The name of a metric where that of its head stands in front (`QED/mse`)."""
    return name.rpartition("/")[2]
