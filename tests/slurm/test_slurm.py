"""The Slurm scripts under a real Slurm: the three stages one after the other, and jobs that are pre-empted."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tagllm.tags import TagLibrary
from tests.slurm.cluster import Cluster, missing
from tests.slurm.requeues import ROOT, STAGE, TWO_NODES, config, ready, requeued

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ready(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def write(cluster: Cluster, name: str, tags: dict[str, Any], source: dict[str, Any], steps: int = 6) -> str:
    config = {
        "output": str(cluster.folder / name),
        "backbone": {"model": str(cluster.folder / "backbone"), "dtype": "fp32"},
        "tags": tags,
        "data": {"sources": [{"path": str(cluster.folder / "rows.csv"), **source}]},
        "optim": {"rows_per_step": 8, "rows_per_micro_batch": 4, "steps": steps, "tag_lr": 0.05, "head_lr": 0.05},
        "checkpoint": {"every_steps": 20},
        "evaluation": {"every_steps": 1000},
    }
    path = cluster.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_three_stages(cluster: Cluster) -> None:
    """Each stage takes the tags of those before; the last library holds all of them."""
    library = str(cluster.folder / "one" / "library")
    one = write(cluster, "one", {"SMILES": {"length": 2}}, {"template": "It is <SMILES> {smiles}"})
    loaded = {"SMILES": {"load": library}, "Size": {"kind": "function", "length": 2, "head": {}}}
    prompt = {"template": "<SMILES> {smiles}. Its size is <Size>", "target": "size"}
    two = write(cluster, "two", loaded, prompt)
    both = {"SMILES": {"load": library}, "Size": {"load": str(cluster.folder / "two" / "library"), "learn": True}}
    three = write(cluster, "three", both, {**prompt, "template": "<SMILES> {smiles} has the size <Size>"})
    said = cluster.run("bash", str(ROOT / "launch/slurm/pipeline.sh"), *TWO_NODES, "--", one, two, three)
    jobs = [line.rpartition(" ")[2] for line in said.splitlines()]
    assert len(jobs) == 3
    assert "afterok" in cluster.run("scontrol", "show", "job", jobs[1]), "the second waits for the first"
    cluster.wait_for(jobs)
    saved = TagLibrary.load(cluster.folder / "three" / "library")
    assert {"Size"} <= set(saved.tags)


def test_stages_behind_one_that_failed_leave_the_queue(cluster: Cluster) -> None:
    fails = ("--export=ALL,SRUN_ARGS=--no-such-option", *TWO_NODES)
    said = cluster.run("bash", str(ROOT / "launch/slurm/pipeline.sh"), *fails, "--", "1.yaml", "2.yaml", "3.yaml")
    jobs = [line.rpartition(" ")[2] for line in said.splitlines()]
    cluster.wait_until(lambda: [cluster.state(job) for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"])


def test_a_pre_empted_job_ends_with_the_same_tags(cluster: Cluster) -> None:
    """First asked to save (USR1), then sent off by Slurm (requeue): the tags are those of a job left alone."""
    record = requeued(cluster, 2, seed=0)
    print(record)
    assert not record.corruptions


def test_a_stopped_job_of_an_array_leaves_the_others_alone(cluster: Cluster) -> None:
    """Two jobs, of which one has the array's own number: each is asked to leave while the other runs."""
    log, script = cluster.folder / "array", cluster.folder / "array.sh"
    script.write_text(f"""
say() {{ echo "$* $SLURM_ARRAY_TASK_ID" >>{log}; }}
wait_for() {{ until grep -q "$1" {log}; do sleep 0.2; done; }}
case $SLURM_ARRAY_TASK_ID.${{SLURM_RESTART_COUNT:-0}} in
0.0) say begin; wait_for "begin 1"; say leave; exit 75 ;;
1.0) say begin; wait_for "again 0"; say leave; exit 75 ;;
0.1) say again; wait_for "again 1"; say end ;;
1.1) say again; say end ;;
*) say sent off ;;
esac
""")
    job = cluster.run("sbatch", "--parsable", "--array=0-1", "--time=30", STAGE[0], str(script)).strip()
    cluster.wait_for([f"{job}_0", f"{job}_1"])
    found = sorted(log.read_text().splitlines())
    assert found == [f"{what} {task}" for what in ("again", "begin", "end", "leave") for task in (0, 1)]


def test_a_sweep_as_an_array(cluster: Cluster) -> None:
    """Each task trains and scores one run; the same sweep without --only then makes the table and trains nothing."""
    prompt = {"template": "{smiles} has the size <Size>", "target": "size"}
    tags = {"Size": {"kind": "function", "length": 2, "head": {}}}
    sweep = f"{sys.executable} -m tagllm sweep {write(cluster, 'swept', tags, prompt)} --grid tags.length=1,2 --seeds 2"
    array = ["sbatch", "--parsable", "--array=0-3", "--time=30", "--wrap", f"{sweep} --only $SLURM_ARRAY_TASK_ID"]
    job = cluster.run(*array).strip()
    cluster.wait_for([f"{job}_{task}" for task in range(4)])
    logs = sorted((cluster.folder / "swept").glob("*/metrics.jsonl"))
    assert len(logs) == 4
    before = [log.read_bytes() for log in logs]
    cluster.run(*shlex.split(sweep))
    assert [log.read_bytes() for log in logs] == before
    (table,) = (cluster.folder / "swept").glob("sweep*.json")
    assert [one["runs"] for one in json.loads(table.read_text())["combinations"]] == [2, 2]


def test_starts_without_progress_are_capped(cluster: Cluster) -> None:
    """Stopped while Python is still importing, again and again: queued again, but not for ever."""
    settings = ("--export=ALL,MAX_IDLE_STARTS=1", *TWO_NODES)
    job = cluster.run("sbatch", "--parsable", *settings, *STAGE, config(cluster, "idle", 40)).strip()
    log = cluster.folder / f"tagllm-{job}.log"
    for start in (1, 2):
        begun = f"start number {start}"
        cluster.wait_until(lambda begun=begun: log.exists() and begun in log.read_text())  # type: ignore[misc]
        time.sleep(1)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_until(lambda: cluster.state(job) == "FAILED")
    said = log.read_text()
    assert said.count("back into the queue") == 1
    assert "stopped 2 times in a row before one step was done; not queued again" in said


def test_a_cancelled_job_stays_away(cluster: Cluster) -> None:
    """Its ranks save as for any other end, and nobody queues it again."""
    job = cluster.run("sbatch", "--parsable", *TWO_NODES, *STAGE, config(cluster, "cancelled", 4000)).strip()
    log = cluster.folder / "cancelled" / "metrics.jsonl"
    cluster.wait_until(lambda: log.exists() and "train/loss" in log.read_text())
    cluster.run("scancel", job)
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader", f"--jobs={job}", check=False).strip())
    said = (cluster.folder / f"tagllm-{job}.log").read_text()
    assert "the state is saved" in said and "not queued again: the job was cancelled" in said
    assert cluster.state(job) == "CANCELLED"
