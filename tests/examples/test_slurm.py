"""The batch script's decisions, with commands of SLURM that only note how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

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


class Attempt(NamedTuple):
    """One run of the script. `srun` and its environment are empty where it was not called."""

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
    folder: Path, status: int = 0, *flags: str, restarts: int = 0, **environment: str
) -> Attempt:
    """Run the script as the job's attempt number `restarts`, of which srun ends with `status`."""
    calls, seen = folder / "calls", folder / "calls.env"
    calls.write_text("")
    seen.write_text("")
    variables = {
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
    }
    command = ["bash", str(SCRIPT), *flags]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    lines = [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]
    return Attempt(
        done.returncode,
        next((line[1:] for line in lines if line[0] == "srun"), []),
        dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line),
        ["scontrol", "requeue", "41"] in lines,
        done.stderr,
    )


def follow(words: list[str], first: str) -> list[str]:
    """The words from the first one with that text on."""
    return words[words.index(first) :]


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, False), (2, False), (17, False), (74, True), (75, True), (137, True), (1, True)],
)
def test_status_decides_on_requeue(folder: Path, status: int, requeued: bool) -> None:
    first = attempt(folder, status)
    assert (first.requeued, first.status) == (requeued, status), first.errors
    assert ("error: " in first.errors) == (status in (2, 17))


@pytest.mark.parametrize(
    ("history", "requeued"),
    [
        # Status, and the checkpoint that the attempt saves.
        ([(1, "")] * 4, [True] * 3 + [False]),
        ([(1, "")] * 3 + [(1, "1000")] + [(1, "")] * 3, [True] * 6 + [False]),
        ([(75, str(step)) for step in range(7)], [True] * 7),
    ],
    ids=["none", "one", "always one"],
)
def test_restarts_without_a_new_checkpoint_are_limited(
    folder: Path, history: list[tuple[int, str]], requeued: list[bool]
) -> None:
    attempts = [
        attempt(folder, status, restarts=restarts, SAVES=saves)
        for restarts, (status, saves) in enumerate(history)
    ]
    assert [one.requeued for one in attempts] == requeued
    if not requeued[-1]:
        assert attempts[-1].status == 1
        line = "error: failed with status 1 after 3 restarts without a new checkpoint"
        assert line in attempts[-1].errors


def test_restarts_by_slurm_are_limited_as_well(folder: Path) -> None:
    attempt(folder, 1)
    assert attempt(folder, restarts=3).srun
    # Nodes died: the script was not there to decide.
    late = attempt(folder, restarts=4)
    assert (late.srun, late.requeued, late.status) == ([], False, 1)
    assert "error: given up after 3 restarts" in late.errors


def test_another_job_begins_to_count_anew(folder: Path) -> None:
    attempt(folder, 75, restarts=5, SAVES="1000")
    attempt(folder, 0, restarts=6)
    errors = [attempt(folder, 1, restarts=n, SLURM_JOB_ID="42").errors for n in range(4)]
    assert [error.startswith("error: failed") for error in errors] == [False] * 3 + [True]


def test_refused_requeue_ends_with_the_status(folder: Path) -> None:
    refused = attempt(folder, 75, REQUEUE_STATUS="1")
    assert refused.status == 75
    assert "error: SLURM does not requeue this job" in refused.errors


def test_arguments_reach_the_program_as_they_are(folder: Path) -> None:
    flags = ["--data-path", "/data/a b/$(touch x)`id`", "", "*", '"quoted"']
    srun = attempt(folder, 0, *flags).srun
    assert follow(srun, flags[0])[: len(flags)] == flags
    assert follow(srun, "--save")[1] == f"{folder}/a run/checkpoints"
    # A user's own comes later and wins.
    assert flags[0] in follow(srun, "--save-interval")


def test_one_task_a_gpu(folder: Path) -> None:
    first = attempt(folder)
    options = ["--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=12"]
    repo = f"{folder}/repo"
    program = [f"{repo}/.venv/bin/python", f"{repo}/pretrain_gpt_rw.py"]
    assert first.srun[:7] == [*options, "env", "--ignore-signal=USR1", *program]
    assert first.environment["MASTER_ADDR"] == "n7"
    assert "NCCL_SOCKET_IFNAME" not in first.environment


def test_interface_is_where_the_processes_meet(folder: Path) -> None:
    environment = attempt(folder, INTERFACE="ib0").environment
    names = ("MASTER_ADDR", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    assert [environment[name] for name in names] == ["10.1.2.3", "=ib0", "ib0"]


def test_torchrun_has_one_task_a_node(folder: Path) -> None:
    srun = attempt(folder, restarts=2, LAUNCHER="torchrun").srun
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96"} <= set(srun)
    wanted = "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 41-2 --rdzv-endpoint"
    assert follow(srun, "--nnodes")[:10] == [*wanted.split(), "n7:20041"]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_container(folder: Path, runtime: str) -> None:
    image, mounts = "/images/a b.sqsh", f"{folder}/a run:{folder}/a run,/data:/data"
    srun = attempt(folder, CONTAINER=runtime, IMAGE=image, MOUNTS="/data:/data").srun
    if runtime == "pyxis":
        assert {f"--container-image={image}", f"--container-mounts={mounts}"} <= set(srun)
    else:
        start = ["apptainer", "exec", "--nv", "--bind", mounts, image, "env"]
        assert follow(srun, "apptainer")[:7] == start
    program = ["env", "--ignore-signal=USR1", "python", "/opt/megatron-rw/pretrain_gpt_rw.py"]
    assert follow(srun, "env")[:4] == program


@pytest.mark.parametrize(
    ("choice", "value", "named"),
    [
        ("CONTAINER", "docker", "docker"),
        ("LAUNCHER", "mpirun", "mpirun"),
        ("CONTAINER", "apptainer", "IMAGE"),
    ],
)
def test_wrong_choice_is_refused(folder: Path, choice: str, value: str, named: str) -> None:
    refused = attempt(folder, **{choice: value})  # type: ignore[arg-type]
    assert (refused.srun, refused.requeued) == ([], False)
    assert refused.status != 0
    assert named in refused.errors
