"""Maps in 8 and 4 bits: what they are worth, what they weigh, and that their gradient is the one of what they are."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from tagllm.config import Quantization
from tagllm.model.linear import FrozenLinear
from tagllm.model.quantize import (
    OUTLIER,
    PIECE,
    Int8Linear,
    LlmInt8Linear,
    Nf4Linear,
    at_a_time,
    bytes_per_weight,
    quantised,
)

KINDS: dict[Quantization, type[FrozenLinear]] = {"int8": Int8Linear, "llm_int8": LlmInt8Linear, "nf4": Nf4Linear}
DTYPES = [torch.float32, torch.bfloat16]


def layer(out_features: int = 48, in_features: int = 128, dtype: torch.dtype = torch.float32) -> FrozenLinear:
    random = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(out_features, in_features, generator=random) * torch.logspace(-3, 1, out_features)[:, None]
    bias_O = torch.randn(out_features, generator=random)
    weight, bias = (nn.Parameter(value.to(dtype), requires_grad=False) for value in (weight_OI, bias_O))
    return FrozenLinear(weight, bias, transposed=False, exact="live")


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_off_by_half_a_step(dtype: torch.dtype) -> None:
    original = layer(dtype=dtype)
    found = quantised(original, "int8").matrix()
    step_O1 = original.weight.float().abs().amax(dim=1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * original.weight.float().abs()
    assert found.dtype == dtype
    assert ((found.float() - original.weight.float()).abs() <= 0.51 * step_O1 + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_what_bitsandbytes_makes_of_it(dtype: torch.dtype) -> None:
    original = layer(dtype=dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        original.weight.detach(), compress_statistics=True, quant_type="nf4"
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    found = quantised(original, "nf4").matrix()
    assert found.dtype == dtype
    assert found.equal(expected)
    assert 0.01 < float((found.float() - original.weight.float()).norm() / original.weight.float().norm()) < 0.12


def test_only_a_cpu_is_given_nf4_in_pieces() -> None:
    """Seven billion weights are 99,000 pieces, each with calls of its own."""
    assert [len(piece) for piece in at_a_time(torch.empty(PIECE + 64))] == [PIECE, 64]
    assert [len(piece) for piece in at_a_time(torch.empty(9 * PIECE, device="meta"))] == [9 * PIECE]


@pytest.mark.parametrize("width", [32, 40, 64, 96])
def test_nf4_takes_the_right_scales_whatever_the_width(width: int) -> None:
    """bitsandbytes' own kernel for CPUs does not."""
    weight_OI = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    original = FrozenLinear(nn.Parameter(weight_OI, requires_grad=False), None, transposed=False)
    found = quantised(original, "nf4").matrix()
    for block, expected in zip(found.flatten().split(64), weight_OI.flatten().split(64), strict=True):
        assert (block - expected).abs().max() <= 0.17 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_gradients_are_those_of_the_quantised_matrix(kind: Quantization, dtype: torch.dtype) -> None:
    original = layer(dtype=dtype)
    found = quantised(original, kind)
    assert type(found) is KINDS[kind]
    input = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = found(input)
    (gradient,) = torch.autograd.grad(output.square().sum(), input)
    matrix_OI = found.matrix().float()
    expected = input.detach() @ matrix_OI.T + original.bias.float()
    expected_gradient = (2 * expected) @ matrix_OI
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    if kind == "llm_int8":  # whose product rounds its input, and so what `square` hands back; not its own backward
        tolerance = 0.02
        expected_gradient = (2 * output.detach().float()) @ matrix_OI
    assert (output - expected).norm() <= tolerance * expected.norm()
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


def test_llm_int8_multiplies_outliers_apart() -> None:
    """One column of huge inputs would else leave the others no steps."""
    found = quantised(layer(), "llm_int8")
    input = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)) * 0.1
    input[:, 7] = 0
    quiet = input @ found.matrix().T
    input[:, 7] = 50 * OUTLIER
    expected = input @ found.matrix().T + found.bias
    assert (found(input) - expected).norm() <= 0.05 * quiet.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_forward_is_kept(kind: Quantization) -> None:
    kept: list[Tensor] = []
    found = quantised(layer(), kind)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        found(torch.randn(5, 128).requires_grad_())
    assert not kept


@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind: Quantization) -> None:
    """All that is kept lies in Parameters, since ZeRO-3 shards nothing else."""
    found = quantised(layer(512, 1024, torch.bfloat16), kind)
    assert not list(found.buffers())
    num_bytes = sum(p.nbytes for name, p in found.named_parameters() if name != "bias")
    assert num_bytes == pytest.approx(bytes_per_weight(kind, 1024, torch.bfloat16) * 512 * 1024, rel=1e-3)
    assert num_bytes < 512 * 1024 * (0.52 if kind == "nf4" else 1.01)


def test_a_row_of_zeros_stays_one() -> None:
    original = layer()
    original.weight.data[3] = 0
    for kind in KINDS:
        assert not quantised(original, kind).matrix()[3].any()
