"""`python -m tests.faults.rank ARGS` is `python -m tagllm ARGS` under the hooks; LAB names the folder of its plan."""

from __future__ import annotations

import os
from pathlib import Path

from tagllm.cli import main
from tests.faults.hooks import Hooks

if __name__ == "__main__":
    Hooks(Path(os.environ["LAB"]), int(os.environ.get("RANK", "0"))).install()
    main()
