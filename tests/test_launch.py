"""What the launch scripts start, with a python, srun and scontrol that only note what they are asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then
    if [ "$GPUS" = unseen ]; then echo "error: torch sees no GPU" >&2; exit 1; fi
    if [ "${CUDA_VISIBLE_DEVICES-all}" ]; then echo "$GPUS 16"; else echo "0 16"; fi
    exit
fi
echo "$@"
echo "threads=$OMP_NUM_THREADS meet=$MASTER_ADDR:$MASTER_PORT accelerator=$DS_ACCELERATOR"
if [ -f "$DS_ENV_FILE" ]; then cat "$DS_ENV_FILE"; fi
"""
TASK = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_JOB_ID": "7",
    "MASTER_ADDR": "n",
}
SRUN = """#!/bin/sh
echo "srun with ${SRUN_CPUS_PER_TASK-no} cores"
echo "meeting at $MASTER_ADDR:$MASTER_PORT: $*"
exit 76
"""
SCONTROL = """#!/bin/sh
if [ "$1 $2" = "show hostnames" ]; then printf 'n1\\nn2\\n'; else echo "scontrol $@"; fi
"""


def launch(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a clone whose path has a space."""
    clone, programs = folder / "a clone", folder / "programs"
    shutil.copytree(ROOT / "launch", clone / "launch")
    for name in ("programs", "home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    asked = {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "sleep": "#!/bin/sh\n"}
    for name, text in asked.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    common = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    return subprocess.run(
        ["bash", *command], cwd=clone, env={**common, "GPUS": "2", "MASTER_PORT": "1", **variables},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def told(folder: Path, **variables: str) -> list[str]:
    """How python is called, and the lines behind that."""
    ended = launch(folder, "launch/run.sh", "x.yaml", **variables)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({}, "--num_accelerators 2"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "--include localhost:2,3"),
        ({"CUDA_VISIBLE_DEVICES": "4,6", "RANKS": "1"}, "--include localhost:4"),
        ({"CUDA_VISIBLE_DEVICES": "4,6", "HOSTFILE": "hosts", "RANKS": "2"}, "--num_accelerators 2"),
        ({"HOSTFILE": "hosts"}, ""),  # which has slots=N
        ({"CUDA_VISIBLE_DEVICES": "", "RANKS": "3"}, "--num_accelerators 3"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "RANKS": "3", "DS_ACCELERATOR": "cpu"}, "--num_accelerators 3"),
    ],
    ids=str,
)
def test_deepspeed_starts_on_the_gpus_that_are_visible(tmp_path: Path, variables: dict[str, str], where: str) -> None:
    hostfile = variables.get("HOSTFILE", "/dev/null")
    command, _, *_ = told(tmp_path, LAUNCHER="deepspeed", **variables)
    assert (
        command.split()
        == (
            f"-m deepspeed.launcher.runner --quiet --hostfile {hostfile} {where} --master_port 1 --no_local_rank "
            "--module tagllm train x.yaml"
        ).split()
    )


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "none"])
def test_what_is_trained_over_ranks_is_scored_over_them_too(tmp_path: Path, launcher: str) -> None:
    """`RANK` and its like are made of srun's variables for any command."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "programs" / "torchrun").chmod(0o755)
    command, *_ = told(tmp_path, LAUNCHER=launcher, TAGLLM_COMMAND="eval", **(TASK if launcher == "none" else {}))
    assert command.endswith(" tagllm eval x.yaml")


def test_without_gpus_to_see_deepspeed_is_told_so(tmp_path: Path) -> None:
    _, settings = told(tmp_path, LAUNCHER="deepspeed", CUDA_VISIBLE_DEVICES="")
    assert settings.endswith("accelerator=cpu")


@pytest.mark.parametrize(
    ("visible", "problem"),
    [
        ("GPU-8932f937", "CUDA_VISIBLE_DEVICES is 'GPU-8932f937'; for the deepspeed launcher it must be numbers"),
        ("4,6", "RANKS is 3; it must be at most the number of GPUs, and with CUDA_VISIBLE_DEVICES=4,6 there are 2."),
    ],
)
def test_gpus_that_deepspeed_cannot_be_given_are_refused(tmp_path: Path, visible: str, problem: str) -> None:
    variables = {"LAUNCHER": "deepspeed", "CUDA_VISIBLE_DEVICES": visible, "RANKS": "3"}
    ended = launch(tmp_path, "launch/run.sh", "x.yaml", **variables)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: launch/run.sh: {problem}")


def test_gpus_that_torch_does_not_see_are_not_taken_for_none(tmp_path: Path) -> None:
    ended = launch(tmp_path, "launch/run.sh", "x.yaml", LAUNCHER="deepspeed", GPUS="unseen")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "error: torch sees no GPU\n")


def test_other_hosts_are_told_what_is_set_here(tmp_path: Path) -> None:
    """And what the user's own file holds."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("MINE=1")
    hosts = {"LAUNCHER": "deepspeed", "HOSTFILE": "hosts"}
    _, _, *lines = told(tmp_path, **hosts, TAGLLM_CACHE="/a cache", HF_HUB_OFFLINE="1", HF_TOKEN="secret")
    assert lines == ["OMP_NUM_THREADS=8", "TAGLLM_CACHE=/a cache", "HF_HUB_OFFLINE=1", "MINE=1"]
    assert not [*(tmp_path / "tmp").iterdir()]


def test_the_users_file_for_other_hosts_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("MINE=1\n")
    _, _, *lines = told(tmp_path, LAUNCHER="deepspeed", HOSTFILE="hosts", DS_ENV_FILE=str(tmp_path / "mine"))
    assert lines == ["MINE=1"]


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"RANKS": "4"}, 4),
        ({"LAUNCHER": "none", "SLURM_TASKS_PER_NODE": "8(x2)", **TASK}, 2),
        ({"LAUNCHER": "none", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_PER_TASK": "16", **TASK}, 16),
        ({"LAUNCHER": "none", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 16),
    ],
    ids=str,
)
def test_cores_are_divided_once(tmp_path: Path, variables: dict[str, str], threads: int) -> None:
    """Where srun binds a task to its cores, the 16 that it sees are its own."""
    _, settings = told(tmp_path, **{"LAUNCHER": "deepspeed", **variables})
    assert settings.startswith(f"threads={threads} ")


def test_a_task_meets_the_others_on_the_first_node(tmp_path: Path) -> None:
    """Where there is no scontrol, as in a container: on the node that srun was started on."""
    asked = {"LAUNCHER": "none", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    variables = {**TASK, **asked, "MASTER_ADDR": "", "MASTER_PORT": ""}
    assert " meet=n1:20007 " in told(tmp_path / "outside", **variables)[1]
    inside = tmp_path / "inside"
    (inside / "bin").mkdir(parents=True)
    for name in ("bash", "dirname"):  # the folders of the system may have a scontrol
        (inside / "bin" / name).symlink_to(str(shutil.which(name)))
    (inside / "bin" / "python").write_text(PYTHON)
    (inside / "bin" / "python").chmod(0o755)
    assert " meet=10.0.0.1:20007 " in told(inside, PATH=str(inside / "bin"), **variables)[1]


def test_a_job_says_where_its_tasks_meet_and_hands_options_to_srun(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "MASTER_PORT": ""}
    srun_args = "--container-image=a.sqsh --container-mounts=/data:/data"
    ended = launch(tmp_path, "launch/slurm/stage.sbatch", "launch/run.sh", "x.yaml", SRUN_ARGS=srun_args, **variables)
    assert f"meeting at n1:20017: --wait=60 {srun_args} bash launch/run.sh x.yaml" in ended.stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, "17_2"),
    ],
    ids=["alone", "of an array"],
)
def test_a_stopped_job_requeues_itself_alone(tmp_path: Path, variables: dict[str, str], job: str) -> None:
    variables |= {"SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "4"}
    ended = launch(tmp_path, "launch/slurm/stage.sbatch", "launch/run.sh", "x.yaml", **variables)
    assert ended.returncode == 76, ended.stderr
    asked = [line for line in ended.stdout.splitlines() if line.startswith(("srun", "scontrol"))]
    scored = launch(
        tmp_path / "scored", "launch/slurm/stage.sbatch", "launch/run.sh", "run", TAGLLM_COMMAND="eval", **variables
    )
    assert scored.returncode == 76 and "scontrol requeue" not in scored.stdout, "nothing is saved to go on from"
    update, requeue = f"scontrol update JobId={job} Comment=tagllm-idle-1", f"scontrol requeue {job}"
    assert asked == ["srun with 4 cores", update, requeue]
