"""Who sees whom, as a pure function of positions and spans."""

from __future__ import annotations

from torch import Tensor


def seen(at_BS: Tensor, span_BS: Tensor, at_BT: Tensor, span_BT: Tensor, window: int | None) -> Tensor:
    """(B, S, T): whether the query at position `at_BS` sees the key at position `at_BT` (-1: no key).

    Causal: what stands at or before it; with a sliding window, less than `window` before it. Under the block mask
    (positions inside a domain tag and its field carry the number of their span, all others 0; without one all carry 0)
    a domain tag and its span see only each other, as in the code the authors released:

          a D x x b
        a 1 . . . .
        D . 1 . . .
        x . 1 1 . .
        x . 1 1 1 .
        b 1 1 1 1 1
    """
    before_BST = at_BS[:, :, None] - at_BT[:, None, :]
    seen_BST = (before_BST >= 0) & (at_BT >= 0)[:, None, :]
    if window is not None:
        seen_BST &= before_BST < window
    return seen_BST & ((span_BS == 0)[:, :, None] | (span_BS[:, :, None] == span_BT[:, None, :]))
