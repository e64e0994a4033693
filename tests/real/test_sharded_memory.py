"""Two ranks load SmolLM2: neither ever holds the whole, and half of it stays with each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
SLACK = 24 << 20
"""Bytes for the interpreter's own objects and what the allocator does not give back."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize(("dtype", "quantize"), [("fp32", "none"), ("bf16", "none"), ("bf16", "int8"), ("bf16", "nf4")])
def test_a_rank_holds_its_shard_and_two_tensors(dtype: str, quantize: str, tmp_path: Path) -> None:
    for found in two_ranks(dtype, quantize, tmp_path):
        shown = {name: f"{num_bytes / 2**20:.1f} MiB" for name, num_bytes in found.items()}
        print(f"{dtype}, {quantize}: {shown}; resident {found['resident'] / found['whole']:.3f} of the whole")
        assert found["peak"] <= found["shard"] + found["largest"] + SLACK
        assert found["resident"] <= 0.55 * found["whole"]


def two_ranks(dtype: str, quantize: str, folder: Path) -> list[dict[str, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.real.shard_worker", dtype, quantize, str(folder / "tiny")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]
