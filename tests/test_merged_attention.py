"""Attention of prefix passes on a CPU: several sets of keys, put together, are one softmax over all of them."""

from __future__ import annotations

import pytest
import torch

from tagllm.model import merged_attention
from tagllm.model.backbone import multiply_fp32_in_onednn
from tagllm.model.merged_attention import Shared, attend_merged


@pytest.mark.parametrize("kernel", ["at once", "few at a time", "flash"])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_sets_put_together_equal_one_softmax(kernel: str, num_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "flash":
        monkeypatch.setattr(merged_attention, "EXPLICIT_UP_TO", 0)
    if kernel == "few at a time":
        monkeypatch.setattr(merged_attention, "SCORES_AT_ONCE", 40)
        monkeypatch.setattr(merged_attention, "QUERIES_AT_ONCE", 2)
    torch.manual_seed(0)
    B, H, S, E, scale = 3, 4, 5, 8, 0.3
    query, keys, values = torch.randn(B, H, S, E), *torch.randn(2, B, num_groups, S, E)
    rows_of = [slice(1, 3), [0, 2], slice(0, B)]
    keys_of, values_of = zip(*(torch.randn(2, num_groups, T, E) for T in (7, 7, 4)), strict=True)
    shared = [Shared(rows, query[rows], *of) for rows, *of in zip(rows_of, keys_of, values_of, strict=True)]
    found = attend_merged(query, keys, values, shared, scale)
    for b, seen in enumerate([[1, 2], [0, 2], [0, 1, 2]]):
        for h in range(H):
            g = h * num_groups // H
            scores = scale * query[b, h] @ torch.cat([keys[b, g], *(keys_of[n][g] for n in seen)]).T
            scores[:, :S].masked_fill_(torch.ones(S, S).triu(1).bool(), -torch.inf)
            expected = scores.softmax(dim=1) @ torch.cat([values[b, g], *(values_of[n][g] for n in seen)])
            torch.testing.assert_close(found[b, h], expected, rtol=1e-5, atol=1e-6)


def test_fp32_products_stay_exact() -> None:
    multiply_fp32_in_onednn()
    torch.manual_seed(0)
    left, right = torch.randn(300, 576), torch.randn(576, 1536)
    exact = left.double() @ right.double()
    for product in (left @ right, (left[None] @ right)[0]):
        assert float((product - exact).norm() / exact.norm()) < 1e-6
