"""A rank of a group in which rank 0 works for longer than ranks wait for each other."""

from __future__ import annotations

import sys
import time

from tagllm.ranks import Ranks

TIMEOUT_S, WORK_S = 3, 7


def work() -> str:
    time.sleep(WORK_S)
    return "done"


if __name__ == "__main__":
    print(Ranks.start(TIMEOUT_S).on_rank_zero(work), file=sys.stderr)
