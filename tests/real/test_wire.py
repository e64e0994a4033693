"""What two ranks with the whole backbone each tell each other, counted by the kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAN_UNSHARE = os.geteuid() == 0 and shutil.which("unshare") is not None and shutil.which("ip") is not None
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not CAN_UNSHARE, reason="needs root, unshare and ip, for a loopback device of its own"),
]
ROWS, HIDDEN = 40, 576
COUNT = "ip link set lo up; bash launch/run.sh {} >&2; awk '/lo:/ {{print $10}}' /proc/self/net/dev"


def bytes_sent(folder: Path, steps: int) -> int:
    """By both ranks in a run of so many steps."""
    source = "{recipe: rdkit-nci, template: 'It is <SMILES> {smiles}', rows: {train: 64, valid: 4, test: 4}}"
    config = folder / "run.yaml"
    config.write_text(
        f"backbone: {{model: smollm2}}\ntags: {{SMILES: {{length: {ROWS}}}}}\ndata: {{sources: [{source}]}}\n"
        "optim: {rows_per_step: 4, rows_per_micro_batch: 2}\n"
        "evaluation: {every_steps: 100}\ncheckpoint: {every_steps: 100}\n"
    )
    command = COUNT.format(f"{config} output={folder / str(steps)} optim.steps={steps}")
    ended = subprocess.run(
        ["unshare", "--net", "bash", "-c", command],
        cwd=ROOT, env={**os.environ, "RANKS": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (folder / str(steps) / "library" / "tags.safetensors").exists(), ended.stderr
    return int(ended.stdout.split()[-1])


def test_a_step_sends_the_gradient_of_the_tags_and_hardly_more(tmp_path: Path) -> None:
    per_step = (bytes_sent(tmp_path, 53) - bytes_sent(tmp_path, 3)) / 50 / 2
    gradient = ROWS * HIDDEN * 4
    print(f"{per_step / 1000:.1f} kB per step and rank; the gradient has {gradient / 1000:.1f} kB")
    # what the launcher's store says meanwhile differs by some 100 kB from run to run
    assert 0.95 * gradient <= per_step <= 1.25 * gradient < 200_000
