"""Which stretches of a batch's frozen prefixes are computed once for several rows.

A share is a stretch of one row: (start, end, number of the span or 0). Rows have equally many, (0, 0, 0) is nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from tagllm.data.encode import Example

Share = tuple[int, int, int]


def beginnings(examples: Sequence[Example], cuts: Sequence[int], groups_only: bool) -> list[list[Share]]:
    """At most one share per row: what its group is alike in, else its beginning up to the field that, taken over the
    batch, leaves least to compute.

    Args:
        cuts: where the frozen prefix of each row ends.
        groups_only: leave out what merely happens to be alike.
    """
    alike = [min(e.alike_to, cut) if e.group >= 0 else None for e, cut in zip(examples, cuts, strict=True)]
    candidates = [[0] * len(examples)]
    if not groups_only:
        num_fields = max(len(example.fields_at) for example in examples)
        candidates += [
            [int(min([cut, *e.fields_at[k : k + 1]])) for e, cut in zip(examples, cuts, strict=True)]
            for k in range(num_fields + 1)
        ]
    ends_of = [[a if a is not None else end for a, end in zip(alike, ends, strict=True)] for ends in candidates]
    best = min(ends_of, key=lambda ends: _num_positions(examples, ends, cuts))
    return [[(0, end, 0)] if any(best) else [] for end in best]


def _num_positions(examples: Sequence[Example], ends: Sequence[int], cuts: Sequence[int]) -> int:
    """What there is to compute if different beginnings (up to `ends`) are computed once each."""
    once = {(end, e.ids[:end].tobytes()) for e, end in zip(examples, ends, strict=True)}
    return sum(end for end, _ in once) + sum(cuts) - sum(ends)


def free_spans(examples: Sequence[Example], cuts: Sequence[int]) -> list[list[Share]]:
    """Every span that lies whole in the prefix: under the block mask it depends on nothing but itself."""
    found = [
        [(int(start), int(end), number) for number, (start, end) in enumerate(e.spans_at, 1) if end <= cut]
        for e, cut in zip(examples, cuts, strict=True)
    ]
    width = max(map(len, found))
    return [[*shares, *[(0, 0, 0)] * (width - len(shares))] for shares in found]


def digest(*values: bytes | np.ndarray) -> bytes:
    """128 bits over values and their lengths."""
    hashed = hashlib.blake2b(digest_size=16)
    for value in values:
        content = value if isinstance(value, bytes) else value.tobytes()
        hashed.update(len(content).to_bytes(4, "big") + content)
    return hashed.digest()
