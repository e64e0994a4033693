"""What a head must beat, on the same held-out rows: the training mean, and ridge probes on the frozen LLM."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from tagllm.config import HeadConfig, Reads
from tagllm.data.encode import TagLayout
from tagllm.evaluate.closed_form import answers_of, fit_head
from tagllm.evaluate.features import Features
from tagllm.evaluate.passes import Floats, Pass
from tagllm.head import Head


def probe_of(result: Pass, layout: TagLayout) -> Features:
    """What a probe on the frozen LLM sees: states before the function tag, and means over the fields. Only rows with a
    target (sources without the head have none). Where the function tag is absent, its head itself reads the state
    before it."""
    classes = any(head.classes for head in layout.heads.values())
    targets_nK = result.targets_nK[:, : 1 if classes else None]
    known = np.isfinite(targets_nK).all(axis=1)
    absent = not any(layout.lengths[name] for name in layout.heads)
    last_nD = result.last_nD if absent else result.prefix_last_nD
    return Features(last_nD[known], result.mean_nD[known], targets_nK[known])


def value_baselines(train: Features, valid: Features, held_out: Features, layout: TagLayout) -> dict[str, Floats]:
    """What predict-the-mean answers to the held-out rows (n, K), and ridge on the hidden state right before the
    function tag (`ridge_last`), averaged over the fields (`ridge_mean`), or both side by side; where a head of the
    run may have a kernel, so may they (`kernel_last`, ...). What has to be chosen is chosen on the validation rows.
    The means are those that the run's heads read."""
    mean_1K = train.targets_nK.mean(axis=0, keepdims=True)
    found = {"predict_mean": np.repeat(mean_1K, len(held_out.targets_nK), axis=0)}
    heads = layout.heads.values()
    probes = [("ridge", HeadConfig()), *(("kernel", head) for head in heads if head.kernel == "anova")]
    read = {"outputs": mean_1K.shape[1], "layers": list(layout.layers), "lengths": layout.reads_lengths}
    for name, head in probes:
        for reads in get_args(Reads):
            spec = head.model_copy(update={**read, "reads": reads})
            probe = fit_head(_blank(spec, layout.pools, train), train.rows(reads), valid.rows(reads))
            found[f"{name}_{reads}"] = answers_of(probe, held_out.rows(reads).features_nF)
    return found


def _blank(spec: HeadConfig, pools: tuple[int, ...], train: Features) -> Head:
    mean_K, std_K = train.targets_nK.mean(axis=0), train.targets_nK.std(axis=0)
    head = Head.new(spec, train.last_nD.shape[1], pools)
    return replace(head, mean_K=torch.from_numpy(mean_K), std_K=torch.from_numpy(std_K).clamp(min=1e-12))
