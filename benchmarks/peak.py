"""Peak memory of one contestant in a process of its own: load, then two steps of eight rows.

`python -m benchmarks.peak LETTER WORKLOAD SETTINGS` prints one line of JSON; `vs_peers` calls it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.models import Models, Settings

ROWS = 8


class Peak(NamedTuple):
    """Of the whole process, and how much of it came on top of what was there before the first step."""

    process_bytes: int
    steps_bytes: int


def peak_of(letter: str, workload: str, settings: Settings) -> Peak:
    """Runs in a fresh process.

    Raises:
        SystemExit: the process failed; its last words are in the message.
    """
    command = [sys.executable, "-m", "benchmarks.peak", letter, workload, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"peak memory of {letter} on {workload}: the process failed:\n{done.stderr[-2000:]}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def main(letter: str, name: str, settings: Settings) -> None:
    from benchmarks.measure import forget_peak, peak_bytes
    from benchmarks.vs_peers import contestants, quiet
    from benchmarks.workloads import build_workload

    quiet()
    contestant = next(c for c in contestants() if c.letter == letter)
    with tempfile.TemporaryDirectory() as scratch:
        models = Models(settings, Path(scratch))
        backbone = models.tagged if contestant.uses_tagged_backbone else models.plain
        workload = build_workload(name, settings, backbone, Path(scratch))
        contestant.setup(workload, models)
        rows = workload.chunk(ROWS)
        forget_peak(settings.device)
        before = peak_bytes(settings.device)
        contestant.run([rows, rows], ROWS)
        after = peak_bytes(settings.device)
    print(json.dumps(Peak(after, after - before)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Settings(*json.loads(sys.argv[3])))
