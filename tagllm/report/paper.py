"""What the paper reports (Tag-LLM, ICML 2024, tables 3 to 5; p = 10), to stand beside the same tasks of ours.

Data and splits of the paper are not ours unless a run says so: they show orders of magnitude, no contest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

TAG = "Tag-LLaMA-7B"
_COUNTERPARTS = {
    "tag": TAG, "full": TAG, "ridge_last": "linear probe", "nearest_row": "nearest neighbour",
    "enriched domain tag": "ablation: enriched domain tags", "no domain tag": "ablation: no domain tags",
    "no function tag": "ablation: no function tags", "digits": "ablation: no head",
}  # fmt: skip
"""Rows of the paper by those of ours (methods, and the variants of configs/variants/) that are called otherwise."""


class Published(NamedTuple):
    metric: str
    about: str
    rows: dict[str, dict[str, float]]
    """Metrics by method."""

    def beside(self, label: str) -> float | None:
        """What the paper has for its counterpart of a row of ours."""
        length = re.fullmatch(r"tags\.(?:[\w-]+\.)?length=(\d+)", label)
        name = f"ablation: length {length[1]}" if length else _COUNTERPARTS.get(label, label)
        return self.rows.get(TAG if name == "ablation: length 10" else name, {}).get(self.metric)


_VALUES: dict[str, tuple[str, str, dict[str, float]]] = {
    "Descriptor": ("mse", "its peptides", {
        "Tag-LLaMA-7B": 0.005, "Tag-Mistral-7B": 0.0048, "LoRA + head": 0.007, "LoRA + head + domain as text": 0.008,
        "prompt tuning + head": 0.008, "linear probe": 0.041, "nearest neighbour": 0.012,
    }),
    "QED": ("mse", "its molecules", {
        "Tag-LLaMA-7B": 0.008, "Tag-Mistral-7B": 0.011, "LoRA + head": 0.015, "LoRA + head + domain as text": 0.015,
        "prompt tuning + head": 0.0083, "linear probe": 0.012, "nearest neighbour": 0.040,
    }),
    "DrugCombination": ("mae", "TDC DrugComb_CSS", {
        "Tag-LLaMA-7B": 12.21, "Tag-Mistral-7B": 12.34, "LoRA + head": 12.53, "LoRA + head + domain as text": 12.79,
        "prompt tuning + head": 15.29, "linear probe": 24.11, "best expert (MLP)": 16.85,
        "ablation: enriched domain tags": 12.10, "ablation: no domain tags": 12.39, "ablation: no function tags": 21.14,
        "ablation: no head": 23.42,
        "ablation: length 1": 13.25, "ablation: length 5": 12.75, "ablation: length 20": 13.0,
        "ablation: length 50": 13.45,
    }),
    "BindingAffinity": ("pearson", "TDC BindingDB_Patent", {
        "Tag-LLaMA-7B": 0.527, "Tag-Mistral-7B": 0.472, "LoRA + head": 0.534, "LoRA + head + domain as text": 0.552,
        "prompt tuning + head": 0.38, "linear probe": 0.18, "best expert (Otter)": 0.588,
        "best expert (IM-DTI, leaderboard 2025)": 0.596,
    }),
}  # fmt: skip
"""Tag: the metric, the data and the value by method."""
_SPBLEU = {
    "EN-FR": 40.5, "FR-EN": 45.7, "EN-RU": 14.2, "RU-EN": 30.1, "EN-DE": 23.0, "DE-EN": 40.5, "IT-FR": 28.8,
    "FR-IT": 23.9, "ES-PT": 24.6, "PT-ES": 27.8,
}  # fmt: skip
"""Tag-LLaMA-7B on FLORES-101."""


_OTHER_QUANTITY = {("DrugCombination", "oneil"), ("BindingAffinity", "davis")}
"""Tags that on these rows learn another quantity than in the paper (Loewe synergy, no CSS; pKd of kinases alone)."""


def published_of(names: Sequence[str], recipes: Collection[str] = ()) -> Published | None:
    """Of the first of these tags, or cases named after a pair of languages (`EN-FR`), that the paper has.

    Args:
        recipes: named data sets that the rows are of.
    """
    for name in names:
        if any((name, recipe) in _OTHER_QUANTITY for recipe in recipes):
            continue
        if name in _VALUES:
            metric, about, values = _VALUES[name]
            return Published(metric, about, {method: {metric: value} for method, value in values.items()})
        if (pair := name.split()[0] if name.split() else "") in _SPBLEU:
            return Published("spbleu", "FLORES-101", {TAG: {"spbleu": _SPBLEU[pair]}})
    return None
