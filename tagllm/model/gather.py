"""Rows of a frozen table and of tags, gathered by id; a gradient for the learned tag rows and for nothing else.

V vocabulary, F frozen and L learned tag rows, D hidden size, B rows, S positions.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from tagllm import launched


def gather_rows(
    table_VD: Tensor, frozen_FD: Tensor, learned_LD: Tensor, ids_BS: Tensor, vocabulary_size: int, dtype: torch.dtype
) -> Tensor:
    """The row of each id, cast to `dtype` once: (B, S, D).

        id  0 ... V-1 | V ... V+F-1 | V+F ... V+F+L-1
            table_VD  | frozen_FD   | learned_LD

    An id outside is taken as the nearest one inside, forward and backward: nothing out of bounds is ever read.
    `learned_LD` is fp32 and has an fp32 gradient, the same bits in every run; the others have none. Nothing waits for
    the device. One Triton kernel on CUDA where it can be compiled, else plain PyTorch.

    Args:
        vocabulary_size: V; the table may have more rows than that, which no id reaches.
    """
    assert vocabulary_size <= len(table_VD) and learned_LD.dtype == torch.float32
    rows_BSD: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
        learned_LD, table_VD, frozen_FD, ids_BS, vocabulary_size, dtype
    )
    return rows_BSD


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, learned_LD: Tensor, table_VD: Tensor, frozen_FD: Tensor, ids_BS: Tensor, vocabulary_size: int,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(ids_BS)
        ctx.first_learned_id, ctx.num_learned = vocabulary_size + len(frozen_FD), len(learned_LD)
        if _has_kernel(ids_BS):
            from tagllm.model import gather_triton

            return gather_triton.gather(table_VD, frozen_FD, learned_LD, ids_BS, vocabulary_size, dtype)
        return plain_gather(table_VD, frozen_FD, learned_LD, ids_BS, vocabulary_size, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (ids_BS,) = ctx.saved_tensors
        if _has_kernel(ids_BS):
            from tagllm.model import gather_triton

            learned = gather_triton.sum_of_learned(grad_BSD, ids_BS, ctx.first_learned_id, ctx.num_learned)
        else:
            learned = plain_sum(grad_BSD, ids_BS, ctx.first_learned_id, ctx.num_learned)
        return learned, None, None, None, None, None


def _has_kernel(ids_BS: Tensor) -> bool:
    return ids_BS.is_cuda and kernels_run(ids_BS.device)


@cache
def kernels_run(device: torch.device) -> bool:
    """Whether triton is installed and gets both kernels to run on this device, which it may not: it needs a C compiler
    on the machine that trains. Rank 0 says so."""
    if find_spec("triton") is None:
        return False
    row_1D, ids_11 = torch.zeros(1, 16, device=device), torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        from tagllm.model import gather_triton

        gather_triton.gather(row_1D, row_1D, row_1D, ids_11, 1, torch.float32)
        gather_triton.sum_of_learned(row_1D[None], ids_11, 0, 1)
    except Exception as error:  # noqa: BLE001  triton has no one kind of error for what a machine lacks
        if launched.rank() == 0:
            first = str(error).strip().partition("\n")[0] or repr(error)
            print(
                f"warning: triton cannot run here, so rows of tags are gathered without its kernel: {first}", flush=True
            )
        return False
    return True


def plain_gather(
    table_VD: Tensor, frozen_FD: Tensor, learned_LD: Tensor, ids_BS: Tensor, vocabulary_size: int, dtype: torch.dtype
) -> Tensor:
    """`where` of two lookups, without a graph."""
    rows_TD = torch.cat([frozen_FD, learned_LD]).to(dtype)
    ids_BS = ids_BS.clamp(0, vocabulary_size + len(rows_TD) - 1)
    tokens_BSD = embedding(ids_BS.clamp(max=vocabulary_size - 1), table_VD).to(dtype)
    if not len(rows_TD):  # the control without a tag
        return tokens_BSD
    tags_BSD = embedding((ids_BS - vocabulary_size).clamp(min=0), rows_TD)
    return torch.where((ids_BS < vocabulary_size)[..., None], tokens_BSD, tags_BSD, out=tokens_BSD)


def plain_sum(grad_BSD: Tensor, ids_BS: Tensor, first_learned_id: int, num_learned: int) -> Tensor:
    """Sums of the gradient over the positions of each learned row: (L, D), fp32.

    PyTorch's own backward of a lookup, in which all other positions are padding: it adds in order on a CPU and sorts on
    CUDA, so its bits repeat on both (`index_add_` uses atomics on CUDA). The cast is for bf16 gradients, whose sums
    it would round to bf16.
    """
    row_BS = (ids_BS - first_learned_id + 1).clamp(0, num_learned)
    sums: Tensor = torch.ops.aten.embedding_dense_backward(grad_BSD.float(), row_BS, num_learned + 1, 0, False)
    return sums[1:]
