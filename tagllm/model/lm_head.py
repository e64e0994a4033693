"""The LM head with its cross entropy in chunks: losses and gradients without a `tokens x vocabulary` matrix.

N positions, V vocabulary, D hidden size, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tagllm.model.linear import FrozenLinear, multiply_rounded


def chunk_bytes(cuda: bool) -> int:
    """Of fp32 logits in one chunk; a chunk holds about three times as much at its peak. More on a GPU, which is idle
    in products of few positions (32 MiB are 65 of them at V = 128k)."""
    return 1 << (29 if cuda else 25)


class FrozenHead(FrozenLinear):
    """Logits (N, V) in the weight's dtype; with labels the loss of each position, in nats (N), fp32.

    The weight is frozen, so the gradient with respect to the hidden states is known as soon as the loss is: both are
    made chunk by chunk in the forward pass, and backward only scales rows (and needs no weight under ZeRO-3).

    Why no kernel from elsewhere on CUDA (as of liger-kernel 0.8.5 and cut-cross-entropy 25.1.1): with losses per
    position Liger keeps its input, runs the forward again in backward (which needs the weight gathered) and rounds the
    logits to bf16; cut-cross-entropy sums the gradient over blocks of the vocabulary in bf16. Both would cost more
    than the 2 % of error that tag gradients may have; a matmul with an fp32 result does not.
    """

    def forward(self, input: Tensor, label_N: Tensor | None = None, softcap: float | None = None) -> Tensor:
        if label_N is None:
            return super().forward(input)
        chunk = max(1, chunk_bytes(input.is_cuda) // (4 * self.out_features))
        nats_N: Tensor = _Nats.apply(input, self, label_N, softcap, chunk)  # type: ignore[no-untyped-call]
        return nats_N

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, V), fp32. A CPU rounds them to bf16 first: that hardly shows in gradients, and a cast weight is large."""
        if self.weight.dtype == torch.float32 or not hidden_CD.is_cuda:
            return self.multiply(hidden_CD).float()
        logits_CV = torch.mm(hidden_CD.to(self.weight.dtype), self.matrix().t(), out_dtype=torch.float32)
        return logits_CV if self.bias is None else logits_CV.add_(self.bias)


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head: FrozenHead, label_N: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        nats_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        needs_grad = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND, dtype=torch.float32) if needs_grad else None
        for at in range(0, len(hidden_ND), chunk):
            here = slice(at, at + chunk)
            nats_N[here], grad_CV = _nats_of(head.logits(hidden_ND[here]), label_N[here], softcap, needs_grad)
            if grad_ND is not None:
                grad_ND[here] = multiply_rounded(grad_CV.to(head.weight.dtype), head.matrix().t())
            del grad_CV  # before the next chunk is made
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
            ctx.dtype = hidden_ND.dtype
        return nats_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * grad_N[:, None]).to(ctx.dtype), None, None, None, None


def _nats_of(logits_CV: Tensor, label_C: Tensor, softcap: float | None, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Cross entropy (C), and where `needs_grad` its gradient with respect to the logits, which are overwritten."""
    slope_CV = None
    if softcap is not None:
        logits_CV.div_(softcap).tanh_()
        slope_CV = logits_CV.square().neg_().add_(1) if needs_grad else None
        logits_CV.mul_(softcap)
    picked_C1 = logits_CV.gather(1, label_C[:, None])
    highest_C1 = logits_CV.amax(dim=1, keepdim=True)
    weight_CV = logits_CV.softmax(dim=1)
    total_C1 = highest_C1 - weight_CV.amax(dim=1, keepdim=True).log()  # log of the sum of exponentials
    if needs_grad:
        weight_CV.scatter_add_(1, label_C[:, None], torch.full_like(picked_C1, -1.0))
    if slope_CV is not None:
        weight_CV.mul_(slope_CV)
    return (total_C1 - picked_C1)[:, 0], weight_CV
