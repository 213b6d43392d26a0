"""How a process finds the others, from what its launcher set."""

from __future__ import annotations

import pytest

from megatron_rw.platform.launch import complete_environment

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_NNODES": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
TASK = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
MINE = {"MASTER_ADDR": "mine", "MASTER_PORT": "7"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        pytest.param({}, SINGLE, id="a single process needs nothing"),
        pytest.param(SLURM | {"SLURM_NTASKS": "1"}, SINGLE, id="one task is a single process"),
        pytest.param(TORCHRUN | {"RANK": "1"}, TORCHRUN | {"RANK": "1"}, id="torchrun"),
        pytest.param(SLURM, TASK | {"MASTER_ADDR": "10.0.0.1"}, id="srun's tasks are ranks"),
        pytest.param(
            SLURM | {"SLURM_NNODES": "1"}, TASK | {"MASTER_ADDR": "127.0.0.1"}, id="one node"
        ),
        pytest.param(SLURM | MINE, TASK | MINE, id="the user's master wins"),
    ],
)
def test_environment_is_completed(env: dict[str, str], expected: dict[str, str]) -> None:
    env = dict(env)
    complete_environment(env)
    assert env.items() >= expected.items()
    assert env["MASTER_PORT"] in (TORCHRUN["MASTER_PORT"], "7") or (
        1024 < int(env["MASTER_PORT"]) < 65536
    )


def test_tasks_of_a_job_agree_on_the_port() -> None:
    one, other = dict(SLURM), SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    complete_environment(one)
    complete_environment(other)
    assert one["MASTER_PORT"] == other["MASTER_PORT"]
