"""Tag gradients of a low-precision backbone against fp32 arithmetic on the same weights, on real prompts.

SmolLM2 is stored in bf16 and the reference computes in fp32 with just these weights, so that arithmetic alone differs.
For a quantised backbone the reference is the quantised weights in fp32 likewise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tagllm.build import Built, build
from tagllm.config import RunConfig
from tagllm.config_file import parse_as
from tagllm.data.batch import count
from tagllm.model.linear import FrozenLinear
from tagllm.model.loss import total
from tagllm.ranks import Ranks
from tagllm.stage import read_stage
from tests import tiny

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
NUM_PROMPTS = 8
TEXT = "The SMILES of the molecule is {smiles}. Its drug-likeness is"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "domain tag": (
        {"SMILES": {"kind": "domain", "length": 10}}, {"template": "The SMILES of the molecule is <SMILES> {smiles}"}
    ),
    "function tag with a head": (
        {"QED": {"kind": "function", "length": 4, "head": {"reads": "both"}}},
        {"template": f"{TEXT} <QED>", "target": "qed"},
    ),
    "function tag that writes": (
        {"QED": {"kind": "function", "length": 4}}, {"template": f"{TEXT} <QED> {{output}}", "output": "qed"}
    ),
}  # fmt: skip


class Bound(NamedTuple):
    cosine: float
    relative: float


AIM = Bound(0.9999, 0.02)
EACH = Bound(0.9995, 0.03)
"""Of the gradients of the prompts one by one, in every case. Measured on AMX: .9998 / 1.2 to 2.2 %, NF4 as bf16."""
# Of the gradient of all prompts together, with room for other orders of summation (threads, kernels). The aim is met
# but for the head, whose error depends on the rows: it scales with how far its values are off. Measured:
# .99991 / 1.4 %, .99986 / 1.7 % and .99998 / 0.7 %; before the up map was exact in the live part a domain tag had
# .9998 / 2.2 %. None for a quantised backbone with a head: there the gradients of the prompts nearly cancel (norm .92,
# in bf16 8.2), and their errors, which EACH bounds, are another part of what is left on each machine (NF4: 12 % on
# AVX-512, 23 % on AMX). The reference of a quantised backbone has the same weights in fp32.
TOGETHER = {
    ("bf16", "domain tag"): Bound(0.9995, 0.03),
    ("bf16", "function tag with a head"): Bound(0.9995, 0.03),
    ("bf16", "function tag that writes"): AIM,
    **{(how, case): Bound(0.9995, 0.03) for how in ("int8", "nf4") for case in CASES if not case.endswith("head")},
}


def built(case: str, how: str, output: Path, ranks: Ranks) -> Built:
    """`how`: fp32 or bf16, or quantised to be computed in bf16."""
    tags, source = CASES[case]
    rows = {"train": NUM_PROMPTS, "valid": 1, "test": 1}
    source = {"recipe": "rdkit-nci", "max_characters": {"smiles": 60}, "rows": rows, **source}
    optim = {"steps": 1, "rows_per_step": NUM_PROMPTS, "rows_per_micro_batch": NUM_PROMPTS}
    config = {"output": str(output), "tags": tags, "data": {"sources": [source]}, "optim": optim}
    plain = how in ("fp32", "bf16")
    backbone = {"model": "smollm2", "dtype": how if plain else "bf16", "quantize": "none" if plain else how}
    return build(read_stage(parse_as(RunConfig, {**config, "backbone": backbone}, case), case), ranks)


def with_weights_of(reference: Built, other: Built) -> Built:
    """The fp32 model with the matrices that the other one multiplies by."""
    for name, layer in other.backbone.model.base_model.named_modules():
        if isinstance(layer, FrozenLinear):
            reference.backbone.model.base_model.get_submodule(name).weight.data = layer.matrix().float()
    return reference


def tag_gradients(of: Built) -> tuple[Tensor, Tensor]:
    """Of the untrained tag by each prompt (prompts, rows, D) and by all together (rows, D). The head starts at zeros,
    so it gets fixed random numbers."""
    random = torch.Generator().manual_seed(0)
    for head in of.model.heads.values():
        weight_KF = head.get_parameter("weight_KF")
        weight_KF.data = torch.randn(weight_KF.shape, generator=random) * 0.02
    examples = of.examples("train")[0]
    prompts = [examples[i] for i in range(NUM_PROMPTS)]

    def gradient(rows: list[Any]) -> Tensor:
        of.model.tags.learned_TD.grad = None
        batch = of.collator()(rows)
        total(of.model(batch).sums, count(batch), of.stage.weights).backward()
        found = of.model.tags.learned_TD.grad
        assert found is not None and found.dtype == torch.float32
        return found

    return torch.stack([gradient([prompt]) for prompt in prompts]), gradient(prompts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["bf16", "int8", "nf4"])
def test_tag_gradients(how: str, case: str, tmp_path: Path, ranks: Ranks) -> None:
    model = built(case, how, tmp_path, ranks)
    expected = tag_gradients(with_weights_of(built(case, "fp32", tmp_path, ranks), model))
    found = tag_gradients(model)
    bounds = (EACH, TOGETHER.get((how, case)))
    for what, ours, theirs, bound in zip(("each prompt", "all together"), found, expected, bounds, strict=True):
        cosine = float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))
        relative = tiny.relative_error(ours, theirs)
        aim = "met" if cosine >= AIM.cosine and relative <= AIM.relative else "missed"
        print(f"{how}, {case}, {what}: cosine {cosine:.6f}, relative error {relative:.2%}; the aim of {AIM} is {aim}")
        assert bound is None or (cosine >= bound.cosine and relative <= bound.relative)
