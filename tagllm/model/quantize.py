"""Frozen linear maps whose weight is kept in 8 or 4 bits; the only module that imports bitsandbytes.

What they keep are plain Parameters, so ZeRO-3 shards them like any other. A product makes the matrix in the compute
dtype, where it lives for this product only; the gradient is exact for the quantised weights.

O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from tagllm.config import Quantization
from tagllm.model.linear import Exact, FrozenLinear

PIECE = 1 << 16
"""Weights that NF4 is made of at a time on a CPU; whole blocks."""
OUTLIER = 6.0
"""Of LLM.int8's paper."""


class Int8Linear(FrozenLinear):
    """Weight-only: W is about weight (O, I, int8) times scale (O), which has the compute dtype."""

    def __init__(self, weight: nn.Parameter, scale_O: nn.Parameter, bias: nn.Parameter | None, exact: Exact) -> None:
        super().__init__(weight, bias, False, exact)
        self.scale_O = scale_O

    @classmethod
    def quantised(cls, layer: FrozenLinear) -> Self:
        """From the weight of `layer`, row by row to the nearest of 255 steps."""
        matrix_OI = layer.matrix().detach()
        largest_O = matrix_OI.abs().amax(dim=1).float()
        scale_O = (largest_O / 127).clamp(min=1e-12).to(matrix_OI.dtype)
        steps_OI = (matrix_OI / scale_O.float()[:, None]).round_().clamp_(-127, 127)
        return cls(_frozen(steps_OI.to(torch.int8)), _frozen(scale_O), layer.bias, layer.exact)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_O.dtype

    def matrix(self) -> Tensor:
        return self.weight * self.scale_O[:, None]


class LlmInt8Linear(Int8Linear):
    """LLM.int8 (Dettmers et al. 2022, bitsandbytes): the input is rounded to 8 bits too, row by row, and both are
    multiplied as integers; columns of the input with an entry over `OUTLIER` are multiplied in the compute dtype.

    bitsandbytes' own module keeps the matrix outside of any Parameter, where ZeRO-3 does not find it; this one shards.
    """

    def _multiply_rounded(self, input: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        input_MI = input.flatten(0, -2)
        steps_MI, largest_M, outlier_columns = int8_vectorwise_quant(input_MI.half(), threshold=OUTLIER)
        largest_O = self.scale_O.float() * 127
        product_MO, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            input_MI, steps_MI, self.weight, largest_M, largest_O, outlier_columns, self.bias
        )
        result: Tensor = product_MO.view(*input.shape[:-1], self.out_features)
        return result


class Nf4Linear(FrozenLinear):
    """QLoRA's format (bitsandbytes): 4 bits of a normal distribution's quantiles and 8 bits of scale per 64 weights.

    `weight` holds two weights per byte, `absmax` the scales, themselves quantised in blocks of 256 around `offset`: in
    all 4.13 bits per weight.
    """

    def __init__(
        self, weight: nn.Parameter, absmax: nn.Parameter, absmax_scale: nn.Parameter, offset: nn.Parameter,
        bias: nn.Parameter | None, shape: tuple[int, int], dtype: torch.dtype, exact: Exact,
    ) -> None:  # fmt: skip
        super().__init__(weight, bias, False, exact, shape)
        self.absmax, self.absmax_scale, self.offset = absmax, absmax_scale, offset
        self._dtype = dtype

    @classmethod
    def quantised(cls, layer: FrozenLinear) -> Self:
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise

        matrix_OI = layer.matrix().detach()
        pieces = [quantize_4bit(piece, quant_type="nf4") for piece in at_a_time(matrix_OI.flatten())]
        absmax = torch.cat([state.absmax for _, state in pieces])
        offset = absmax.mean()
        quantised_absmax, of_scales = quantize_blockwise(absmax - offset, blocksize=256)
        return cls(
            _frozen(torch.cat([packed.flatten() for packed, _ in pieces])), _frozen(quantised_absmax),
            _frozen(of_scales.absmax), _frozen(offset.reshape(1)), layer.bias,
            (matrix_OI.shape[0], matrix_OI.shape[1]), matrix_OI.dtype, layer.exact,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def matrix(self) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        levels = _levels_of_scales(self.weight.device)
        of_scales = QuantState(absmax=self.absmax_scale, code=levels, blocksize=256, dtype=torch.float32)
        absmax = dequantize_blockwise(self.absmax, of_scales) + self.offset
        # as one long row: on a CPU bitsandbytes takes the wrong scales where rows are no multiple of a block (0.50.2)
        shape = (1, self.out_features * self.in_features)
        row: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight.view(-1, 1), absmax, 64, "nf4", shape, self._dtype
        )
        return row.view(self.out_features, self.in_features)


def at_a_time(weights_n: Tensor) -> Sequence[Tensor]:
    """What bitsandbytes gets in one call: on a CPU it compares every weight with all 16 levels at once, which takes
    memory for each; elsewhere its kernel takes any number."""
    return weights_n.split(PIECE) if weights_n.device.type == "cpu" else [weights_n]


@cache
def _levels_of_scales(device: torch.device) -> Tensor:
    """fp32 (256). bitsandbytes makes them from Python numbers, which takes longer than a small matrix."""
    from bitsandbytes.functional import create_dynamic_map

    levels: Tensor = create_dynamic_map().to(device)
    return levels


def quantised(layer: FrozenLinear, how: Quantization) -> FrozenLinear:
    """A layer that computes nearly the same from fewer bytes; `layer` itself where nothing is to be done."""
    makers: dict[str, Callable[[FrozenLinear], FrozenLinear]] = {
        "int8": Int8Linear.quantised, "llm_int8": LlmInt8Linear.quantised, "nf4": Nf4Linear.quantised,
    }  # fmt: skip
    return makers[how](layer) if how != "none" else layer


def bytes_per_weight(how: Quantization, in_features: int, dtype: torch.dtype) -> float:
    """Of a map's weight with all its scales."""
    per_element = torch.empty(0, dtype=dtype).element_size()
    if how in ("int8", "llm_int8"):
        return 1 + per_element / in_features
    return 0.5 + 1 / 64 + 4 / (64 * 256) if how == "nf4" else per_element


def _frozen(value: Any) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
