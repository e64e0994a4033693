"""Two hosts that see each other by a cable only: they train together, and both say so when it is cut."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from tests.distributed.launch import Ranks, Run, Workspace, assert_same, kill, wait_until
from tests.hosts.network import ADDRESSES, Hosts, missing

ROOT = Path(__file__).parents[2]
WHY = missing()
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300), pytest.mark.skipif(bool(WHY), reason=WHY or "-")]
TIMEOUT_S = 8


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("hosts")
    with Ranks(1, folder) as one, Ranks(2, folder) as two:
        yield Workspace(folder, one, two)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        yield made


def start(
    hosts: Hosts, workspace: Workspace, name: str, ranks: int = 1, **overrides: object
) -> list[subprocess.Popen[str]]:
    """The same command on both, with so many ranks on each."""
    _, config, *settings = workspace.arguments(name, engine__timeout_s=TIMEOUT_S, **overrides)
    variables = {
        "NNODES": "2", "RDZV_ENDPOINT": f"{ADDRESSES[0]}:29500", "RANKS": str(ranks), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "TAGLLM_CACHE": str(workspace.folder / "cache"), "GLOO_SOCKET_IFNAME": "cable",
    }  # fmt: skip
    command = ["bash", str(ROOT / "launch" / "run.sh"), config, *settings]
    return [
        hosts.start(
            host, command, workspace.folder / f"{name}-{host}.log",
            **variables, RDZV_CONF=f"is_host={int(host == 0)},read_timeout=10", LOCAL_ADDR=ADDRESSES[host],
        )
        for host in (0, 1)
    ]  # fmt: skip


def test_two_hosts_train_what_one_does(hosts: Hosts, workspace: Workspace) -> None:
    both = start(hosts, workspace, "together")
    try:
        ends = [host.wait(timeout=120) for host in both]
    finally:
        kill(both)
    assert ends == [0, 0], (workspace.folder / "together-0.log").read_text()
    assert_same(Run(workspace.folder / "together").tags, workspace.train(1, "one-host").tags, 1e-5)


def test_a_node_that_shards_by_itself_sends_no_weights(hosts: Hosts, workspace: Workspace) -> None:
    """Two ranks on each host: the same tags, whatever the weights are sharded over; of the bytes between the hosts a
    small part is left."""
    wide = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tiny.save_backbone(workspace.folder / "wide")
    LlamaForCausalLM(wide).save_pretrained(folder)
    model = {"backbone__model": folder, "optim__steps": 12}
    settings = {"engine__zero_stage": 3, "engine__deepspeed": workspace.sharding, **model}
    sent = {}
    for over in ("world", "node"):
        before = hosts.sent()
        both = start(hosts, workspace, f"over-{over}", 2, engine__shard_over=over, **settings)
        try:
            ends = [host.wait(timeout=120) for host in both]
        finally:
            kill(both)
        assert ends == [0, 0], (workspace.folder / f"over-{over}-0.log").read_text()
        sent[over] = hosts.sent() - before
    print(f"bytes from the first host: {sent}")
    assert sent["node"] < 0.2 * sent["world"]
    expected = workspace.train(1, "over-nothing", **model)
    for over in sent:
        assert_same(Run(workspace.folder / f"over-{over}").tags, expected.tags, 1e-5)


def test_a_cut_cable_ends_both_with_a_reason_and_a_restart_goes_on(hosts: Hosts, workspace: Workspace) -> None:
    steps = 120
    settings = {"optim__steps": steps, "checkpoint__every_steps": 10, "evaluation__every_steps": 1000}
    run = Run(workspace.folder / "cut")
    both = start(hosts, workspace, "cut", **settings)
    try:
        wait_until(lambda: len(run.checkpoints) > 1, both, 120)
        hosts.cut()
        logs = [workspace.folder / f"cut-{host}.log" for host in (0, 1)]
        gone = [f"error: rank {host} in step" for host in (0, 1)]
        began = time.monotonic()
        # torchrun itself may look for its store for minutes more
        wait_until(
            lambda: all(line in log.read_text() for line, log in zip(gone, logs, strict=True)), [], TIMEOUT_S + 20
        )
        print(f"both ranks ended {time.monotonic() - began:.1f} s after the cut")
    finally:
        kill(both)
    for host, log in enumerate(logs):
        said = log.read_text()
        assert f"no answer from rank {1 - host}, while in" in said, said
        assert "the newest checkpoint is step-" in said
    assert len(run.metrics) < steps
    hosts.mend()
    again = start(hosts, workspace, "cut", **settings)
    try:
        assert [host.wait(timeout=120) for host in again] == [0, 0], (workspace.folder / "cut-0.log").read_text()
    finally:
        kill(again)
    undisturbed = workspace.train(2, "uncut", **settings)
    assert_same(run.tags, undisturbed.tags, 0)
