"""What a head must beat, on the same held-out rows: the training mean, and ridge probes on the frozen LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch

from tagllm.config import HeadConfig, Kernels, Reads
from tagllm.data.encode import TagLayout
from tagllm.evaluate.closed_form import answers_of, fit_head
from tagllm.evaluate.passes import Floats, Pass
from tagllm.evaluate.ridge import Rows
from tagllm.files import load_tensors, replace_file, save_tensors
from tagllm.head import Head, states_read


class Probe(NamedTuple):
    """What a probe on the frozen LLM sees of some rows: states before the function tag, means over the fields."""

    last_nD: Floats
    mean_nD: Floats
    targets_nK: Floats

    @classmethod
    def of(cls, result: Pass, layout: TagLayout) -> Probe:
        """Only rows with a target (sources without the head have none). Where the function tag is absent, its head
        itself reads the state before it."""
        known = np.isfinite(result.targets_nK).all(axis=1)
        absent = not any(layout.lengths[name] for name in layout.heads)
        last_nD = result.last_nD if absent else result.prefix_last_nD
        return cls(last_nD[known], result.mean_nD[known], result.targets_nK[known])

    def rows(self, reads: Reads) -> Rows:
        """What a ridge on these states is fitted on."""
        return Rows(np.concatenate(states_read(reads, self.last_nD, self.mean_nD), axis=1), self.targets_nK)

    @classmethod
    def together(cls, probes: Sequence[Probe]) -> Probe:
        return cls(*(np.concatenate(column) for column in zip(*probes, strict=True)))

    def none(self) -> Probe:
        """The same of no row."""
        return Probe(*(column[:0] for column in self))

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".tmp-{path.name}")
        save_tensors(temporary, {name: torch.from_numpy(value) for name, value in self._asdict().items()})
        replace_file(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Probe:
        return cls(**{name: tensor.numpy() for name, tensor in load_tensors(path).items()})


def value_baselines(train: Probe, valid: Probe, held_out: Probe, head: HeadConfig) -> dict[str, Floats]:
    """What predict-the-mean answers to the held-out rows (n, K), and ridge on the hidden state right before the
    function tag (`ridge_last`), averaged over the fields (`ridge_mean`), or both side by side; where the head of the
    run may have a kernel, so may they (`kernel_last`, ...). What has to be chosen is chosen on the validation rows."""
    mean_1K = train.targets_nK.mean(axis=0, keepdims=True)
    found = {"predict_mean": np.repeat(mean_1K, len(held_out.targets_nK), axis=0)}
    kernels: list[tuple[str, Kernels]] = [("ridge", "linear"), ("kernel", "rbf")]
    for name, kernel in kernels[: 1 + (head.kernel == "rbf")]:
        for reads in get_args(Reads):
            spec = HeadConfig(outputs=mean_1K.shape[1], reads=reads, kernel=kernel, landmarks=head.landmarks)
            probe = fit_head(_blank(spec, train), train.rows(reads), valid.rows(reads))
            found[f"{name}_{reads}"] = answers_of(probe, held_out.rows(reads).features_nF)
    return found


def _blank(spec: HeadConfig, train: Probe) -> Head:
    mean_K, std_K = train.targets_nK.mean(axis=0), train.targets_nK.std(axis=0)
    head = Head.new(spec, train.mean_nD.shape[1])
    return replace(head, mean_K=torch.from_numpy(mean_K), std_K=torch.from_numpy(std_K).clamp(min=1e-12))
