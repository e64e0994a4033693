"""A rank of a group in which rank 0 works for longer than ranks wait for each other, and then finds a mistake."""

from __future__ import annotations

import os
import sys
import time

from tagllm.errors import UserError
from tagllm.ranks import Ranks

TIMEOUT_S, WORK_S = 3, 7


def work() -> str:
    time.sleep(WORK_S)
    return "done"


def fail() -> None:
    time.sleep(WORK_S)
    raise UserError("row 7 is wrong")


if __name__ == "__main__":
    ranks = Ranks.start(TIMEOUT_S)
    print(ranks.on_rank_zero(work, long=True), file=sys.stderr)
    try:
        ranks.on_rank_zero(fail, long=True)
    except UserError as error:
        print(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort the interpreter's own end
