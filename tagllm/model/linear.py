"""A linear map whose weight is frozen: its backward needs the weight and nothing of the forward.

O outputs, I inputs, M rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Exact = Literal["never", "live", "always"]
PACK_UP_TO = 1 << 30
"""Bytes of weights that may be kept twice."""
PACKED_FOR_ROWS = 512
"""A hint to oneDNN about the usual number of rows; others are as right."""


class FrozenLinear(nn.Linear):
    """`nn.Linear` or GPT-2's `Conv1D` without a gradient for weight and bias, under the same parameter names.

    An fp32 input times a bf16 weight is rounded to bf16 and so is the result, or computed to fp32 precision, as `exact`
    says: `never`, `live` (where a gradient will be asked for) or `always`. The gradient is always rounded.

    For backward only this module is remembered, no tensor: under ZeRO-3 the weight is partitioned in between, and the
    hooks around this module gather it again into the same Parameter.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, exact: Exact = "never",
        shape: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # nn.Linear's own would allocate a second weight
        self.weight, self.transposed, self.exact = weight, transposed, exact
        self.register_parameter("bias", bias)
        self.packs = False
        self._packed: Tensor | None = None
        height, width = shape or tuple(getattr(weight, "ds_shape", weight.shape))
        self.out_features, self.in_features = (width, height) if transposed else (height, width)

    @classmethod
    def of(cls, layer: nn.Module, exact: Exact = "never") -> Self:
        """Shares the parameters of an `nn.Linear` or `Conv1D`."""
        return cls(layer.get_parameter("weight"), layer._parameters["bias"], isinstance(layer, Conv1D), exact)

    @property
    def dtype(self) -> torch.dtype:
        """In which products are computed."""
        return self.weight.dtype

    def matrix(self) -> Tensor:
        """(O, I)."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            result: Tensor = _Linear.apply(input, self)  # type: ignore[no-untyped-call]
            return result
        return self.multiply(input, self.exact == "always")

    def multiply(self, input: Tensor, exact: bool = False) -> Tensor:
        if not exact or input.dtype == self.dtype:
            return self._multiply_rounded(input.to(self.dtype))
        product = multiply_to_fp32(input.flatten(0, -2), self.matrix()).view(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product.add_(self.bias)

    def _multiply_rounded(self, input: Tensor) -> Tensor:
        if not self.packs or hasattr(self.weight, "ds_id"):
            return multiply_rounded(input, self.matrix(), self.bias)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.matrix().contiguous(), PACKED_FOR_ROWS)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")
        return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, input.dtype
        return layer.multiply(input, layer.exact != "never")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        matrix_OI = ctx.layer.matrix()
        return multiply_rounded(grad.to(matrix_OI.dtype), matrix_OI.t()).to(ctx.dtype), None


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN is there and has instructions of this CPU to do so (AVX2 is not enough)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiply_rounded(input: Tensor, matrix_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`functional.linear` in the dtype of its arguments, rounded once.

    Where a CPU has no instructions for bf16, torch's own product takes 5 (forward) to 30 times (backward) as long as
    fp32 does, so it is computed in that, with a matrix that lives for this product only.
    """
    if input.dtype != torch.bfloat16 or input.device.type != "cpu" or cpu_multiplies_bf16():
        return functional.linear(input, matrix_OI, bias_O)
    bias_O = None if bias_O is None else bias_O.float()
    return functional.linear(input.float(), matrix_OI.float(), bias_O).to(input.dtype)


def multiply_to_fp32(input_MI: Tensor, matrix_OI: Tensor) -> Tensor:
    """fp32 (M, O) of an fp32 input and a matrix in half precision.

    A CPU casts the matrix, which lives for this product only. CUDA multiplies two halves of the input, the second one
    being what the first had to round away, so the matrix stays as it is and both products run on tensor cores.
    """
    if not input_MI.is_cuda:
        return input_MI @ matrix_OI.t().float()
    high_MI, low_MI = halves(input_MI, matrix_OI.dtype)
    high_MO = torch.mm(high_MI, matrix_OI.t(), out_dtype=torch.float32)
    return high_MO.add_(torch.mm(low_MI, matrix_OI.t(), out_dtype=torch.float32))


def halves(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of `dtype` whose sum is the input but for the square of its rounding error."""
    high = input.to(dtype)
    return high, (input - high).to(dtype)
