"""One rank that takes jobs: each line on stdin is a JSON list of `tagllm` arguments, the file for its outcome, and the
fault it is to suffer (or null).

Importing torch, transformers and DeepSpeed takes far longer than a tiny run, so the ranks of `launch.Ranks` stay.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import traceback
from pathlib import Path

from tagllm.cli import app
from tests.distributed.faults import injected, of_json


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and stderr of one command; a crash is 1, as it is for the interpreter."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            app(arguments)
        except SystemExit as left:
            return int(left.code or 0), errors.getvalue()
        except Exception:  # noqa: BLE001  a test wants to see it
            return 1, errors.getvalue() + traceback.format_exc()
    return 0, errors.getvalue()


def main() -> None:
    for line in sys.stdin:
        arguments, outcome, fault = json.loads(line)
        with injected(of_json(fault)):
            status, errors = run(arguments)
        gc.collect()
        unfinished = Path(f"{outcome}.tmp")
        unfinished.write_text(json.dumps([status, errors]), encoding="utf-8")
        unfinished.replace(outcome)


if __name__ == "__main__":
    main()
