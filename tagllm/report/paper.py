"""What the paper reports (Tag-LLM, ICML 2024, tables 3 to 5; LLaMA-7B, p = 10), to stand beside the same tasks of ours.

Data and splits of the paper are not ours unless a run says so: the columns show orders of magnitude, no contest.
"""

from __future__ import annotations

PUBLISHED: dict[str, tuple[str, dict[str, float]]] = {
    "Descriptor": ("mse", {
        "Tag-LLaMA-7B": 0.005, "Tag-Mistral-7B": 0.0048, "LoRA + head": 0.007, "prompt tuning + head": 0.008,
        "linear probe": 0.041, "nearest neighbour": 0.012,
    }),
    "QED": ("mse", {
        "Tag-LLaMA-7B": 0.008, "Tag-Mistral-7B": 0.011, "LoRA + head": 0.015, "prompt tuning + head": 0.0083,
        "linear probe": 0.012, "nearest neighbour": 0.040,
    }),
    "DrugCombination": ("mae", {
        "Tag-LLaMA-7B": 12.21, "Tag-Mistral-7B": 12.34, "LoRA + head": 12.53, "prompt tuning + head": 15.29,
        "linear probe": 24.11, "best expert (MLP)": 16.85,
    }),
    "BindingAffinity": ("pearson", {
        "Tag-LLaMA-7B": 0.527, "Tag-Mistral-7B": 0.472, "LoRA + head": 0.534, "prompt tuning + head": 0.38,
        "linear probe": 0.18, "best expert (Otter)": 0.588,
    }),
}  # fmt: skip
"""Tag: the metric and the published value by method."""
