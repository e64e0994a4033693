"""Two hosts on this machine: network namespaces with addresses of their own and a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip is not installed (Debian: iproute2)"
    made = subprocess.run(["ip", "netns", "add", "tagllm-try"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "tagllm-try"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "network namespaces cannot be made here"


class Hosts:
    """`tagllm-a` and `tagllm-b`, joined by one cable."""

    names = ("tagllm-a", "tagllm-b")

    def __enter__(self) -> Hosts:
        self._remove()
        for name in self.names:
            _ip("netns", "add", name)
        a, b = self.names
        _ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def cut(self) -> None:
        _ip("-n", self.names[0], "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self.names[0], "link", "set", "cable", "up")

    def sent(self) -> int:
        """Bytes that the first host has sent."""
        counter = "/sys/class/net/cable/statistics/tx_bytes"
        return int(subprocess.check_output(["ip", "netns", "exec", self.names[0], "cat", counter]))

    def start(self, host: int, command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[str]:
        with log.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command], env={**os.environ, **variables},
                stdout=file, stderr=file, text=True, start_new_session=True,
            )  # fmt: skip

    def _remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
