"""Kernels compare rows with landmarks, and a library keeps them as they are."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.gaussian_process.kernels import Matern

from tagllm.config import HeadConfig
from tagllm.files import DamagedFile, load_tensors, save_tensors, sha256_file
from tagllm.head import Head
from tagllm.kernel import Kernel, Landmarks, similarity_parts
from tagllm.model.value_head import HeadModule
from tagllm.tags import BackboneIdentity, Tag, TagLibrary

D = 6
OFFSET = 300.0
"""Hidden states have an offset far larger than what tells them apart."""


@pytest.mark.parametrize("states", [1, 2, 3])
def test_states_count_by_themselves_and_together(states: int) -> None:
    """The mean over sets of states of the product of sklearn's kernels, however far from the origin all of them are."""
    random = np.random.default_rng(0)
    x, z = (random.normal(size=(number, states, D)) for number in (3000, 20))
    width = random.uniform(0.5, 2, size=(states, D))
    each = [Matern(1.0, nu=1.5)(x[:, at] / width[at], z[:, at] / width[at]) for at in range(states)]
    x_BF, z_MF = (torch.from_numpy(each + OFFSET).float().flatten(1) for each in (x, z))
    found = torch.cat(list(similarity_parts(x_BF, Landmarks.of(z_MF, states), torch.from_numpy(width).float())))
    sets = [chosen for size in range(1, states + 1) for chosen in itertools.combinations(each, size)]
    np.testing.assert_allclose(found, np.mean([np.prod(chosen, axis=0) for chosen in sets], axis=0), atol=1e-3)


def test_steps_go_on_from_rows_that_are_landmarks() -> None:
    """A distance of 0 has no slope; the gradient stays a number."""
    x_BF = torch.randn(40, 2 * D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.cat(list(similarity_parts(x_BF, Landmarks.of(x_BF.detach(), 2), torch.ones(2, D)))).sum().backward()
    assert x_BF.grad is not None and x_BF.grad.isfinite().all()


def recurring(number: int, seed: int) -> torch.Tensor:
    """Rows of a state that each has by itself, and another of which there are seven."""
    few_SD = torch.randn(7, D, generator=torch.Generator().manual_seed(99))
    random = torch.Generator().manual_seed(seed)
    own_BD = torch.randn(number, D, generator=random)
    return OFFSET + torch.cat([own_BD, few_SD[torch.randint(7, (number,), generator=random)]], dim=1)


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Head, Path]:
    """A head with a kernel, and the library that has it."""
    spec = HeadConfig(reads="mean", kernel="anova", landmarks=400)
    weight_KM = torch.randn(1, 400, generator=torch.Generator().manual_seed(2))
    kernel = Kernel(*Landmarks.of(recurring(400, 0), 2), torch.full((2, D), 3.0), weight_KM)
    head = replace(Head.new(spec, D, pools=(0, 1)), kernel=kernel)
    tag = Tag("QED", "function", torch.zeros(2, D), head)
    TagLibrary(BackboneIdentity("tiny", "llama", D, 96, "f" * 64), {"QED": tag}).save(tmp_path / "library")
    return head, tmp_path / "library"


def test_the_library_keeps_the_kernel(kept: tuple[Head, Path]) -> None:
    head, folder = kept
    assert head.kernel is not None and len(head.kernel.state_TD) == 400 + 7, "what recurs is kept once"
    back = TagLibrary.load(folder).tags["QED"].head
    assert back is not None and back.kernel is not None
    assert all(a.equal(b) for a, b in zip(back.kernel, head.kernel, strict=True))
    module, features_BF = HeadModule(back), recurring(300, 1)
    answers_BK = module.unstandardise(module(features_BF, features_BF)).detach()
    np.testing.assert_allclose(answers_BK, head.answer(features_BF), rtol=1e-4, atol=1e-4)
    assert torch.equal(module.as_head().answer(features_BF), back.answer(features_BF))


def test_landmarks_of_states_that_are_not_kept_are_damage(kept: tuple[Head, Path]) -> None:
    head, folder = kept
    assert head.kernel is not None
    document = json.loads((folder / "library.json").read_text())
    tensors = load_tensors(folder / "tags.safetensors")
    save_tensors(folder / "tags.safetensors", tensors | {"QED.head.landmarks": head.kernel.at_SM + 8})
    digest = {"tags.safetensors": sha256_file(folder / "tags.safetensors")}
    (folder / "library.json").write_text(json.dumps(document | {"sha256": digest}))
    with pytest.raises(DamagedFile, match=r"QED.head.landmarks has states that are not among the 407 kept"):
        TagLibrary.load(folder)
