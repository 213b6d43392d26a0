"""The batch script's decisions, with commands of SLURM that only note how they were called."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples/slurm/pretrain.sbatch"
# Arguments are separated by a character that no argument has.
FAKES = {
    "srun": 'printf \'%s\\x1f\' srun "$@" >>"$CALLS"; echo >>"$CALLS"; '
    'if [ -n "$SAVES" ]; then mkdir -p "$RUN/checkpoints"; '
    'printf %s "$SAVES" >"$RUN/checkpoints/latest_checkpointed_iteration.txt"; fi; '
    'env >"$CALLS.env"; exit "$STATUS"',
    "scontrol": 'printf \'%s\\x1f\' scontrol "$@" >>"$CALLS"; echo >>"$CALLS"; '
    'if [ "$1" = show ]; then printf "n%d\\n" {7..9999}; else exit "${REQUEUE_STATUS:-0}"; fi',
    "ip": 'echo "2: $5    inet 10.1.2.3/16 brd 10.1.255.255 scope global $5"',
}


@dataclass(frozen=True)
class Attempt:
    status: int
    srun: list[str]
    environment: dict[str, str]
    requeued: bool
    errors: str


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the commands, for one job."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(0o755)
    return tmp_path


def attempt(
    folder: Path, status: int, restarts: int = 0, flags: Sequence[str] = (), **environment: str
) -> Attempt:
    """Run the script as the job's attempt number `restarts`, of which srun ends with `status`."""
    calls = folder / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["bash", str(SCRIPT), *flags],
        env={
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "STATUS": str(status),
            "SAVES": "",
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NAME": "a",
            "SLURM_JOB_NODELIST": "n[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_CPUS_PER_TASK": "12",
            "SLURM_SUBMIT_DIR": str(folder / "repo"),
            "RUN": str(folder / "a run"),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    lines = [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]
    srun = [line[1:] for line in lines if line[0] == "srun"]
    requeue = ["scontrol", "requeue", "41"]
    seen = calls.with_suffix(".env")
    variables = seen.read_text().splitlines() if srun else []
    return Attempt(
        done.returncode,
        srun[0] if srun else [],
        dict(line.split("=", 1) for line in variables if "=" in line),
        requeue in lines,
        done.stderr,
    )


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, False), (2, False), (17, False), (74, True), (75, True), (137, True), (1, True)],
)
def test_status_decides_on_requeue(folder: Path, status: int, requeued: bool) -> None:
    first = attempt(folder, status)
    assert first.requeued == requeued, first.errors
    assert first.status == status
    assert ("error: " in first.errors) == (status in (2, 17))


def test_failing_again_and_again_ends_with_a_line(folder: Path) -> None:
    for restarts in range(3):
        assert attempt(folder, 74, restarts).requeued
    last = attempt(folder, 74, 3)
    assert (last.requeued, last.status) == (False, 74)
    assert "error: failed with status 74 after 3 restarts without a new checkpoint" in last.errors


def test_new_checkpoint_allows_as_many_restarts_again(folder: Path) -> None:
    for restarts in range(3):
        attempt(folder, 1, restarts)
    assert attempt(folder, 1, 3, SAVES="1000").requeued
    # And also where the attempt that saved it was ended by SLURM.
    for restarts in range(4, 6):
        assert attempt(folder, 1, restarts).requeued
    assert not attempt(folder, 1, 6).requeued


def test_unfinished_is_requeued_however_often(folder: Path) -> None:
    for restarts in range(0, 300, 60):
        assert attempt(folder, 75, restarts, SAVES=str(restarts)).requeued


def test_restarts_by_slurm_are_limited_as_well(folder: Path) -> None:
    attempt(folder, 1, 0)
    assert attempt(folder, 0, 3).srun
    # Nodes died: the script was not there to decide.
    late = attempt(folder, 0, 4)
    assert (late.srun, late.requeued, late.status) == ([], False, 1)
    assert "error: given up after 3 restarts" in late.errors


def test_another_job_begins_to_count_anew(folder: Path) -> None:
    attempt(folder, 75, 5, SAVES="1000")
    attempt(folder, 0, 6)
    for restarts in range(3):
        assert attempt(folder, 1, restarts, SLURM_JOB_ID="42").status == 1
    assert attempt(folder, 1, 3, SLURM_JOB_ID="42").errors.startswith("error: failed")


def test_refused_requeue_ends_with_the_status(folder: Path) -> None:
    refused = attempt(folder, 75, REQUEUE_STATUS="1")
    assert refused.status == 75
    assert "error: SLURM does not requeue this job" in refused.errors


def test_arguments_reach_the_program_as_they_are(folder: Path) -> None:
    flags = ["--data-path", "/data/a b/$(touch x)`id`", "", "*", '"quoted"']
    srun = attempt(folder, 0, 0, flags).srun
    begin = srun.index("--data-path")
    assert srun[begin : begin + len(flags)] == flags
    run = str(folder / "a run")
    assert srun[srun.index("--save") + 1] == f"{run}/checkpoints"
    # A user's own comes later and wins.
    assert srun.index("--save-interval") < begin


def test_one_task_a_gpu(folder: Path) -> None:
    first = attempt(folder, 0)
    repo = str(folder / "repo")
    program = [
        "env",
        "--ignore-signal=USR1",
        f"{repo}/.venv/bin/python",
        f"{repo}/pretrain_gpt_rw.py",
    ]
    options = ["--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=12"]
    assert first.srun[: len(options) + len(program)] == [*options, *program]
    assert first.environment["MASTER_ADDR"] == "n7"
    assert "NCCL_SOCKET_IFNAME" not in first.environment


def test_interface_is_where_the_processes_meet(folder: Path) -> None:
    environment = attempt(folder, 0, INTERFACE="ib0").environment
    assert environment["MASTER_ADDR"] == "10.1.2.3"
    assert environment["NCCL_SOCKET_IFNAME"] == "=ib0"
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


def test_torchrun_has_one_task_a_node(folder: Path) -> None:
    srun = attempt(folder, 0, 2, LAUNCHER="torchrun").srun
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96"} <= set(srun)
    for name, value in {
        "--nnodes": "2",
        "--nproc-per-node": "8",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "41-2",
        "--rdzv-endpoint": "n7:20041",
    }.items():
        assert srun[srun.index(name) + 1] == value


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_container(folder: Path, runtime: str) -> None:
    image, run = "/images/a b.sqsh", str(folder / "a run")
    srun = attempt(folder, 0, CONTAINER=runtime, IMAGE=image, MOUNTS="/data:/data").srun
    mounts = f"{run}:{run},/data:/data"
    if runtime == "pyxis":
        assert {f"--container-image={image}", f"--container-mounts={mounts}"} <= set(srun)
    else:
        begin = srun.index("apptainer")
        wanted = ["apptainer", "exec", "--nv", "--bind", mounts, image]
        assert srun[begin : begin + len(wanted)] == wanted
    begin = srun.index("env")
    program = ["env", "--ignore-signal=USR1", "python", "/opt/megatron-rw/pretrain_gpt_rw.py"]
    assert srun[begin : begin + len(program)] == program


@pytest.mark.parametrize(
    ("choice", "value", "named"),
    [
        ("CONTAINER", "docker", "docker"),
        ("LAUNCHER", "mpirun", "mpirun"),
        ("CONTAINER", "apptainer", "IMAGE"),
    ],
)
def test_wrong_choice_is_refused(folder: Path, choice: str, value: str, named: str) -> None:
    refused = attempt(folder, 0, 0, (), **{choice: value})
    assert (refused.srun, refused.requeued) == ([], False)
    assert refused.status != 0
    assert named in refused.errors
