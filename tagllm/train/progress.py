"""What a run counts beside what it learns."""

from __future__ import annotations

import math
from typing import NamedTuple


class Progress(NamedTuple):
    """Where a run stands; goes into every checkpoint."""

    best_loss: float = math.inf
    best_step: int = -1
    worse_in_a_row: int = 0
    done: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = 0
    """The last step that was scored on the validation split."""
