"""Rows times the keys of their pieces: in one product as with a product for each piece."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tagllm.model.attention import FrozenKeys
from tagllm.model.parts_function import Groups, KeySet, Live, attend_parts


@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    st.integers(1, 3),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
def test_products_of_padded_groups_change_nothing(piece_B: list[int], num_groups: int, lengths: list[int]) -> None:
    torch.manual_seed(len(piece_B))
    B, G, M, S, T, E = len(piece_B), num_groups, 6, 3, max(lengths), 4
    part = FrozenKeys((), (), torch.zeros(4, T), torch.zeros(4, T), tuple(lengths), tuple(piece_B))
    pad_nT = torch.arange(T) >= torch.tensor(lengths)[:, None]
    keys, values = torch.randn(2, 4, G, T, E).masked_fill(pad_nT[:, None, :, None], 0.0)
    live = Live(*torch.randn(2, B, G, S, E), None, None)
    bias = torch.zeros(B, 1, 1, S, T + S)
    hidden_BT = pad_nT[piece_B] | (torch.tensor(piece_B) < 0)[:, None]
    bias[..., :T].masked_fill_(hidden_BT[:, None, None, None], torch.finfo(torch.float32).min)
    answers = []
    for groups in (part.groups(), Groups([], part.together(limit=99))):
        query = torch.randn(B, G, M, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = attend_parts([query], [KeySet(keys, values, groups, 0)], live, bias, None)
        out.square().sum().backward()
        answers.append((out.detach(), query.grad))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
