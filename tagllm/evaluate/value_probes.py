"""What a head must beat, on the same held-out rows: the training mean, and ridge probes on the frozen LLM."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from tagllm.arrays import Floats
from tagllm.config import HeadConfig, Reads
from tagllm.data.layout import TagLayout
from tagllm.evaluate.closed_form import fit_head, predictions_of
from tagllm.evaluate.features import Features
from tagllm.evaluate.passes import Pass
from tagllm.head import Head


def probe_of(result: Pass, mine_n: NDArray[np.bool_], layout: TagLayout, name: str) -> Features:
    """What a probe on the frozen LLM sees of the rows of a head: states before the function tag, and means over the
    fields. Only rows with a target. Where the function tag is absent, its head itself reads the state before it."""
    head = layout.heads[name]
    targets_nK = result.targets_nK[:, : head.num_targets]
    known_n = mine_n & np.isfinite(targets_nK).all(axis=1)
    last_nD = result.prefix_last_nD if layout.lengths[name] else result.last_nD
    return Features(last_nD[known_n], result.mean_nD[known_n], targets_nK[known_n])


def value_baselines(
    train: Features, valid: Features, held_out: Features, layout: TagLayout, head: HeadConfig
) -> dict[str, Floats]:
    """What predict-the-mean answers to the held-out rows (n, K), and ridge on the hidden state right before the
    function tag (`ridge_last`), averaged over the fields (`ridge_mean`), or both side by side; where the head may have
    a kernel, so may they (`kernel_last`, ...). What has to be chosen is chosen on the validation rows. The means are
    those that the run's heads read."""
    mean_1K = train.targets_nK.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    found = {"predict_mean": np.repeat(mean_1K, len(held_out.targets_nK), axis=0)}
    probes = [("ridge", HeadConfig()), *([("kernel", head)] if head.kernel == "anova" else [])]
    read = {"outputs": mean_1K.shape[1], "layers": list(layout.layers), "lengths": layout.reads_lengths}
    for name, like in probes:
        for reads in get_args(Reads):
            spec = like.model_copy(update={**read, "reads": reads})
            probe = fit_head(_blank(spec, layout.pools, train), train.rows(reads), valid.rows(reads))
            found[f"{name}_{reads}"] = predictions_of(probe, held_out.rows(reads).features_nF)
    return found


def _blank(spec: HeadConfig, pools: tuple[int, ...], train: Features) -> Head:
    mean_K, std_K = (of(train.targets_nK, axis=0, dtype=np.float64).astype(np.float32) for of in (np.mean, np.std))
    head = Head.new(spec, train.last_nD.shape[1], pools)
    return replace(head, mean_K=torch.from_numpy(mean_K), std_K=torch.from_numpy(std_K).clamp(min=1e-12))
