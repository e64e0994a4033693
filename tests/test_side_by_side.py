"""Processes side by side: cores and a GPU each, and one that fails stops no other."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Barrier, Event

import pytest

from tagllm import side_by_side
from tagllm.errors import UserError
from tagllm.side_by_side import Script, run_script, run_side_by_side, shares


@pytest.mark.parametrize(
    ("jobs", "visible", "num_gpus", "devices"),
    [
        (1, None, 8, [None]),
        (2, None, 0, [None, None]),
        (2, None, 8, ["0", "1"]),
        (5, None, 2, ["0", "1", "0", "1", "0"]),
        (2, "3, GPU-1f", 2, ["3", "GPU-1f"]),
        (3, "5", 1, ["5", "5", "5"]),
        (2, "4,-1,5", 1, ["4", "4"]),
        (2, "", 0, [None, None]),
        (2, "-1", 0, [None, None]),
    ],
)
def test_runs_side_by_side_have_cores_and_a_gpu_each(
    jobs: int, visible: str | None, num_gpus: int, devices: list[str | None]
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = shares(jobs, environment, num_gpus, 9)
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in found] == devices
    assert [share.get("OMP_NUM_THREADS") for share in found] == ([None] if jobs == 1 else [str(9 // jobs)] * jobs)
    for share in shares(jobs, environment | {"OMP_NUM_THREADS": "7"}, num_gpus, 9):
        assert share.get("OMP_NUM_THREADS", "7") == "7", "what the user has set stays"


def test_no_two_runs_at_a_time_have_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes the GPU of the one that has ended, not that of one that goes on."""
    both, taken = Barrier(2, timeout=60), list[str]()

    def run(script: Script, environment: Mapping[str, str], *_: object) -> None:
        taken.append(environment["CUDA_VISIBLE_DEVICES"])
        both.wait()
        if script.name == "second":
            raise UserError("failed, and gives its GPU back too")

    monkeypatch.setattr(side_by_side, "run_script", run)
    monkeypatch.setattr(side_by_side.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    scripts = [Script(name, []) for name in ("first", "second", "third", "fourth", "fifth", "sixth")]
    assert run_side_by_side(scripts, 2) == ["failed, and gives its GPU back too"]
    assert len(taken) == 6 and all(set(taken[at : at + 2]) == {"0", "1"} for at in (0, 2, 4))


def test_nothing_is_begun_once_a_stop_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the next command of a script whose first ends well."""
    begun, stopping = list[str](), Event()

    class Process:
        returncode = 0

        def __init__(self, command: list[str], **_: object) -> None:
            begun.append(command[-1])

        def communicate(self) -> tuple[str, str]:
            stopping.set()
            return "", ""

    monkeypatch.setattr(side_by_side.subprocess, "Popen", Process)
    run_script(Script("a run", [["train"], ["eval"]]), {}, set(), stopping)
    assert begun == ["train"]
