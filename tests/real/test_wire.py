"""What two ranks with the whole backbone each tell each other, counted by the kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.launch import kill, wait_until

ROOT = Path(__file__).parents[2]
CAN_UNSHARE = os.geteuid() == 0 and shutil.which("unshare") is not None and shutil.which("ip") is not None
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not CAN_UNSHARE, reason="needs root, unshare and ip, for a loopback device of its own"),
]
ROWS, HIDDEN = 40, 576
FIRST, LAST = 4, 34


def test_a_step_sends_the_gradient_of_the_tags_and_hardly_more(tmp_path: Path) -> None:
    source = "{recipe: rdkit-nci, template: 'It is <SMILES> {smiles}', rows: {train: 64, valid: 4, test: 4}}"
    config, run = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(
        f"output: {run}\nbackbone: {{model: smollm2}}\ntags: {{SMILES: {{length: {ROWS}}}}}\n"
        f"data: {{sources: [{source}]}}\noptim: {{steps: {LAST + 4}, rows_per_step: 4, rows_per_micro_batch: 2}}\n"
        "evaluation: {every_steps: 100}\ncheckpoint: {every_steps: 100}\n"
    )
    ranks = subprocess.Popen(
        ["unshare", "--net", "bash", "-c", f"ip link set lo up; bash launch/run.sh {config}"],
        cwd=ROOT,
        env={**os.environ, "RANKS": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    log = run / "metrics.jsonl"
    found = []
    try:
        for step in (FIRST, LAST):
            wait_until(lambda step=step: log.exists() and log.read_text().count("train/loss") >= step, [ranks], 120)  # type: ignore[misc]
            found.append((log.read_text().count("train/loss"), bytes_sent(ranks.pid)))
    finally:
        kill([ranks])
    (before, start), (after, end) = found
    per_step, gradient = (end - start) / (after - before) / 2, ROWS * HIDDEN * 4
    print(f"{per_step / 1000:.1f} kB per step and rank; the gradient has {gradient / 1000:.1f} kB")
    assert gradient <= per_step <= 1.25 * gradient < 200_000


def bytes_sent(process: int) -> int:
    """Over the loopback device that the process sees, by both ranks."""
    lines = Path(f"/proc/{process}/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))
