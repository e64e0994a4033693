"""Fault 8: jobs that are asked to leave (USR1) or sent off (requeue: SIGTERM, then SIGKILL), and go on later."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests import tiny
from tests.distributed.launch import Run, assert_same, molecules
from tests.faults.record import Record
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
FAULT = "8 requeued under Slurm"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--time=30")
STAGE = (str(ROOT / "launch/slurm/stage.sbatch"), str(ROOT / "launch/stage1_domain.sh"))
EVERY = 20


@contextmanager
def ready(folder: Path) -> Iterator[Cluster]:
    """A cluster with a tiny backbone and rows for its jobs."""
    tiny.save_backbone(folder / "backbone")
    rows = molecules(48)
    (folder / "rows.csv").write_text("smiles,size\n" + "".join(f"{s},{n}\n" for s, n, _ in rows))
    with Cluster(folder) as running:
        running.environment |= {"TAGLLM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        running.environment["DS_ACCELERATOR"] = "cpu"
        yield running


def config(cluster: Cluster, name: str, steps: int) -> str:
    path = cluster.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({
        "output": str(cluster.folder / name), "backbone": {"model": str(cluster.folder / "backbone"), "dtype": "fp32"},
        "tags": {"SMILES": {"length": 2}},
        "data": {"sources": [{"path": str(cluster.folder / "rows.csv"), "template": "It is <SMILES> {smiles}"}]},
        "optim": {"rows_per_step": 8, "rows_per_micro_batch": 4, "steps": steps, "tag_lr": 0.05},
        "checkpoint": {"every_steps": EVERY}, "evaluation": {"every_steps": 1000},
    }))  # fmt: skip
    return str(path)


def requeued(cluster: Cluster, times: int, seed: int) -> Record:
    """The final tags are those of a job left alone, and its log holds every start."""
    chooser, steps = random.Random(seed), 150 + 40 * times
    alone = cluster.run("sbatch", "--parsable", *TWO_NODES, *STAGE, config(cluster, "alone", steps)).strip()
    cluster.wait_for([alone])
    job = cluster.run("sbatch", "--parsable", *TWO_NODES, *STAGE, config(cluster, "disturbed", steps)).strip()
    log = cluster.folder / "disturbed" / "metrics.jsonl"

    def steps_done() -> int:
        return log.read_text().count("train/loss") if log.exists() else 0

    done, restarts = list[int](), list[float]()
    for at in range(times):
        before = steps_done()
        until = before + chooser.randint(1, 30)
        cluster.wait_until(lambda until=until: steps_done() >= until)  # type: ignore[misc]
        if at % 2:
            cluster.run("scontrol", "requeue", job)
        else:
            cluster.run("scancel", "--signal=USR1", job)
            cluster.wait_until(lambda: cluster.state(job) == "PENDING")
        began, there = time.monotonic(), steps_done()
        # a resumed run first drops the lines of steps that it does again
        inode = log.stat().st_ino
        cluster.wait_until(lambda inode=inode: log.stat().st_ino != inode)  # type: ignore[misc]
        restarts.append(time.monotonic() - began)
        done.append(there)
    cluster.wait_for([job], 300)
    found, expected = Run(cluster.folder / "disturbed"), Run(cluster.folder / "alone")
    _, _, *starts = (cluster.folder / f"tagllm-{job}.log").read_text().split("start number")
    kept = [re.search(r"going on from step (\d+)", said) for said in starts]
    # after its order to leave a job may still do a step or two, and save
    lost = [max(there - int(found[1] if found else 0), 0) for there, found in zip(done, kept, strict=True)]
    told = [f"{n} steps lost" for n in lost if n > EVERY]
    try:
        assert_same(found.tags, expected.tags, 0)
    except AssertionError as error:
        told.append(f"the final tags differ: {error}")
    if [line["step"] for line in found.metrics] != list(range(1, steps + 1)):
        told.append("the log has gaps")
    return Record(FAULT, times, told, 0, lost, restarts, steps + sum(lost), steps)
