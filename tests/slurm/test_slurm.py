"""The Slurm scripts under a real Slurm: the three stages one after the other, and jobs that are pre-empted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tagllm.tags import TagLibrary
from tests import tiny
from tests.distributed.launch import Run, assert_same, molecules
from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--time=30")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    tiny.save_backbone(folder / "backbone")
    rows = molecules(48)
    (folder / "rows.csv").write_text("smiles,size\n" + "".join(f"{s},{n}\n" for s, n, _ in rows))
    with Cluster(folder) as running:
        running.environment |= {"TAGLLM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
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


def test_a_pre_empted_job_ends_with_the_same_tags(cluster: Cluster) -> None:
    """First asked to save (USR1), then thrown out without a word (requeue): the tags are those of a job left alone."""
    tags = {"SMILES": {"length": 2}}
    source = {"template": "It is <SMILES> {smiles}"}
    alone = write(cluster, "alone", tags, source, steps=300)
    disturbed = write(cluster, "disturbed", tags, source, steps=300)
    stage = (str(ROOT / "launch/slurm/stage.sbatch"), str(ROOT / "launch/stage1_domain.sh"))
    first = cluster.run("sbatch", "--parsable", *TWO_NODES, *stage, alone).strip()
    cluster.wait_for([first])
    job = cluster.run("sbatch", "--parsable", *TWO_NODES, *stage, disturbed).strip()
    log = cluster.folder / "disturbed" / "metrics.jsonl"

    def steps_done() -> int:
        return log.read_text().count("train/loss") if log.exists() else 0

    cluster.wait_until(lambda: steps_done() >= 10)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_until(lambda: cluster.state(job) == "PENDING")
    before = steps_done()
    assert 10 <= before < 300, "it was to be stopped in mid-training"
    cluster.wait_until(lambda: steps_done() >= before + 30)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for([job])
    assert_same(Run(cluster.folder / "disturbed").tags, Run(cluster.folder / "alone").tags, 0)
    said = (cluster.folder / f"tagllm-{job}.log").read_text()
    assert "start number 3" in said, "appended by every start"
    assert "back into the queue" in said
