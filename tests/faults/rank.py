"""`python -m tests.faults.rank ARGS` is `python -m tagllm ARGS` under the hooks; LAB names the folder of its plan.

With ZYGOTE, the socket of a process that forks such ranks, it is forked there.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.faults.zygote import ask


def run() -> None:
    from tagllm.cli import main
    from tests.faults.hooks import Hooks

    Hooks(Path(os.environ["LAB"]), int(os.environ.get("RANK", "0"))).install()
    main()


if __name__ == "__main__":
    if zygote := os.environ.pop("ZYGOTE", ""):
        ask(zygote)
    run()
