"""Who sees whom, as a pure function of positions and spans."""

from __future__ import annotations

from torch import Tensor


def seen(at_BS: Tensor, span_BS: Tensor, at_BT: Tensor, span_BT: Tensor, window: int | None) -> Tensor:
    """(B, S, T): whether the query at position `at_BS` sees the key at position `at_BT` (-1: no key).

    Causal: keys at or before the query; with a sliding window, less than `window` before it. Under the block mask every
    position carries the number of its span (`template.spans_of`: the text before a domain tag, the tag, its field), 0
    outside; under the causal mask all carry 0. A span sees only itself, what is outside sees all before it. (In the
    authors' code that text is outside.) `<s>a <D> {x} b`, where a, D, x, x are one span:

          s a D x x b
        s 1 . . . . .
        a . 1 . . . .
        D . 1 1 . . .
        x . 1 1 1 . .
        x . 1 1 1 1 .
        b 1 1 1 1 1 1
    """
    before_BST = at_BS[:, :, None] - at_BT[:, None, :]
    seen_BST = (before_BST >= 0) & (at_BT >= 0)[:, None, :]
    if window is not None:
        seen_BST &= before_BST < window
    return seen_BST & ((span_BS == 0)[:, :, None] | (span_BS[:, :, None] == span_BT[:, None, :]))
