"""The deepspeed launcher as users of several machines know it: a hostfile, pdsh and ssh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import Ranks, Run, Workspace, assert_same, kill
from tests.hosts.network import ADDRESSES, Hosts, missing

ROOT = Path(__file__).parents[2]
ABSENT = [
    name
    for name in ("sshd", "pdsh", "ssh-keygen")
    if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
]
WHY = missing() or (f"{', '.join(ABSENT)} not installed (Debian: openssh-server, pdsh)" if ABSENT else "")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300), pytest.mark.skipif(bool(WHY), reason=WHY or "-")]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Each with an sshd of its own, which lets the key in `tmp_path` in."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "sshd_config").write_text(
        f"HostKey {tmp_path / 'host'}\nAuthorizedKeysFile {tmp_path / 'user.pub'}\nPermitRootLogin yes\n"
        "StrictModes no\nUsePAM no\nPidFile none\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    with Hosts() as made:
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(tmp_path / "sshd_config")]
        daemons = [made.start(host, command, tmp_path / f"sshd-{host}.log") for host in (0, 1)]
        try:
            yield made
        finally:
            kill(daemons)


def test_deepspeed_starts_both_hosts(hosts: Hosts, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.txt"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    known = {"TAGLLM_CACHE": str(tmp_path / "cache"), "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    with Ranks(1, tmp_path) as one, Ranks(2, tmp_path) as two:
        workspace = Workspace(tmp_path, one, two)
        _, config, *settings = workspace.arguments("over-ssh")
        launched = hosts.start(
            0, ["bash", str(ROOT / "launch" / "run.sh"), config, *settings], tmp_path / "log",
            **known, LAUNCHER="deepspeed", HOSTFILE=str(hostfile), RANKS="1", DS_ACCELERATOR="cpu",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            PDSH_SSH_ARGS_APPEND=f"-i {tmp_path / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
            LAUNCHER_ARGS=f"--no_ssh_check --master_addr {ADDRESSES[0]}",
        )  # fmt: skip
        try:
            status = launched.wait(timeout=150)
        finally:
            kill([launched])
        said = (tmp_path / "log").read_text()
        assert status == 0, said
        assert all(f"{address}: " in said for address in ADDRESSES), said
        assert (tmp_path / "cache").is_dir(), "DeepSpeed was told what is set here"
        assert_same(Run(tmp_path / "over-ssh").tags, workspace.train(1, "one-host").tags, 1e-5)
