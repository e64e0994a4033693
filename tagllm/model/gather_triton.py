"""Triton kernels of the row gather and of its backward; the only file that imports triton.

V vocabulary, F frozen and L learned tag rows, D hidden size, B rows, S positions, N = B S.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATHER_BLOCK = 2048
SUM_BLOCK_N, SUM_BLOCK_D = 16, 256


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(
    out_ND: tl.tensor, table_VD: tl.tensor, frozen_FD: tl.tensor, learned_LD: tl.tensor, ids_N: tl.tensor,
    V: tl.tensor, F: tl.tensor, L: tl.tensor, D: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One position and one block of D per program. The three loads share out the id's cases: lanes that are masked off
    move nothing, so one row is read and one is written, and no pointer leaves its table."""
    n = tl.program_id(0).to(tl.int64)  # int64: tables and outputs may have more than 2^31 elements
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_N + n).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), V + F + L - 1)
    token, frozen = row < V, row < V + F
    inside = d < D
    from_table = tl.load(table_VD + row * D + d, mask=inside & token, other=0.0).to(tl.float32)
    from_frozen = tl.load(frozen_FD + (row - V) * D + d, mask=inside & frozen & (row >= V), other=0.0).to(tl.float32)
    from_learned = tl.load(learned_LD + (row - V - F) * D + d, mask=inside & (row >= V + F), other=0.0).to(tl.float32)
    value = tl.where(token, from_table, tl.where(frozen, from_frozen, from_learned))
    tl.store(out_ND + n * D + d, value.to(out_ND.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(
    sum_LD: tl.tensor, grad_BSD: tl.tensor, order_N: tl.tensor, start_L: tl.tensor, S: tl.tensor,
    stride_B: tl.tensor, stride_S: tl.tensor, stride_D: tl.tensor, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One learned row and one block of D per program: adds its positions' gradients in order, BLOCK_N at a time."""
    row = tl.program_id(0)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    end = tl.load(start_L + row + 1)
    total_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    for at in range(tl.load(start_L + row), end, BLOCK_N):
        k = at + tl.arange(0, BLOCK_N)
        n = tl.load(order_N + k, mask=k < end, other=0)
        offset_N = (n // S) * stride_B + (n % S) * stride_S
        inside = (k < end)[:, None] & (d < D)[None, :]
        tile_ND = tl.load(grad_BSD + offset_N[:, None] + d[None, :] * stride_D, mask=inside, other=0.0)
        total_D += tl.sum(tile_ND.to(tl.float32), axis=0)
    tl.store(sum_LD + row.to(tl.int64) * D + d, total_D, mask=d < D)


def gather(
    table_VD: Tensor, frozen_FD: Tensor, learned_LD: Tensor, ids_BS: Tensor, vocabulary_size: int, dtype: torch.dtype
) -> Tensor:
    """What `gather.plain_gather` gives, bit for bit."""
    assert table_VD.is_contiguous()  # avoiding a copy of it is what this is for
    D = table_VD.shape[1]
    out_BSD = torch.empty(*ids_BS.shape, D, dtype=dtype, device=ids_BS.device)
    block = min(triton.next_power_of_2(D), GATHER_BLOCK)
    _gather_kernel[ids_BS.numel(), triton.cdiv(D, block)](
        out_BSD, table_VD, frozen_FD.contiguous(), learned_LD.contiguous(), ids_BS.contiguous(),
        vocabulary_size, len(frozen_FD), len(learned_LD), D, block,
    )  # fmt: skip
    return out_BSD


def sum_of_learned(grad_BSD: Tensor, ids_BS: Tensor, first_learned_id: int, num_learned: int) -> Tensor:
    """What `gather.plain_sum` gives, up to the order of an fp32 sum: bits repeat from run to run, without atomics.

    A stable sort on the device groups the positions by learned row; the others sort before all of them and are never
    looked at. Price: the sort of N four-byte keys (ten launches or so, about 100 N bytes, the same for 10 rows or 500)
    before each learned position's gradient is read once and each learned row written once. Scanning the ids in
    every program instead would save the sort, but it reads L x D / 256 x 8 N bytes: 4 GB at 500 rows, D = 4096 and
    N = 64k. A row that stands at very many positions is summed by D / 256 programs alone, which is slow, not wrong.
    """
    row_N = (ids_BS.flatten() - first_learned_id).clamp(-1, num_learned - 1).int()
    sorted_N, order_N = row_N.sort(stable=True)
    rows_L = torch.arange(num_learned + 1, dtype=torch.int32, device=ids_BS.device)
    start_L = torch.searchsorted(sorted_N, rows_L, out_int32=True)
    D = grad_BSD.shape[2]
    sum_LD = torch.empty(num_learned, D, dtype=torch.float32, device=ids_BS.device)
    _sum_kernel[num_learned, triton.cdiv(D, SUM_BLOCK_D)](
        sum_LD, grad_BSD, order_N, start_L, grad_BSD.shape[1], *grad_BSD.stride(), D, SUM_BLOCK_N, SUM_BLOCK_D
    )
    return sum_LD
