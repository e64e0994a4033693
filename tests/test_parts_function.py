"""Rows times the keys of their pieces: in one product as with a product for each piece."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tagllm.model.attention import Part
from tagllm.model.parts_function import Groups, KeySet, Live, attend_parts


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=9), st.integers(1, 3))
def test_products_of_padded_groups_change_nothing(piece_B: list[int], num_groups: int) -> None:
    torch.manual_seed(len(piece_B))
    B, G, M, S, T, E = len(piece_B), num_groups, 6, 3, 5, 4
    part = Part((), (), torch.zeros(4, T), torch.zeros(4, T), (T,) * 4, tuple(piece_B))
    keys, values = torch.randn(2, 4, G, T, E)
    live = Live(*torch.randn(2, B, G, S, E), None, None)
    bias = torch.zeros(B, 1, 1, S, T + S)
    bias[torch.tensor(piece_B) < 0, ..., :T] = torch.finfo(torch.float32).min
    answers = []
    for groups in (part.groups(), Groups([], part.together(limit=99))):
        query = torch.randn(B, G, M, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = attend_parts([query], [KeySet(keys, values, groups, 0)], live, bias, None)
        out.square().sum().backward()
        answers.append((out.detach(), query.grad))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
