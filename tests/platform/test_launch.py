"""How a process finds the others, from what its launcher set."""

from __future__ import annotations

import pytest

from megatron_rw.errors import UserError
from megatron_rw.platform.launch import complete_environment

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_NNODES": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def test_single_process_needs_nothing() -> None:
    env: dict[str, str] = {}
    complete_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("0", "1", "0")
    assert env["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 < int(env["MASTER_PORT"]) < 65536


def test_torchruns_variables_are_left_alone() -> None:
    env = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    before = dict(env)
    complete_environment(env)
    assert env == before


def test_half_set_variables_are_refused() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        complete_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_srun_tasks_become_ranks() -> None:
    env = dict(SLURM)
    complete_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", "1")
    assert env["MASTER_ADDR"] == "10.0.0.1"
    other = SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    complete_environment(other)
    assert other["MASTER_PORT"] == env["MASTER_PORT"]


def test_srun_on_one_node_needs_no_address() -> None:
    env = SLURM | {"SLURM_NNODES": "1"}
    del env["SLURM_LAUNCH_NODE_IPADDR"]
    complete_environment(env)
    assert env["MASTER_ADDR"] == "127.0.0.1"


def test_srun_on_several_nodes_without_an_address_is_refused() -> None:
    env = dict(SLURM)
    del env["SLURM_LAUNCH_NODE_IPADDR"]
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        complete_environment(env)


def test_master_of_the_user_wins() -> None:
    env = SLURM | {"MASTER_ADDR": "mine", "MASTER_PORT": "7"}
    complete_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("mine", "7")


def test_one_slurm_task_is_a_single_process() -> None:
    env = SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    complete_environment(env)
    assert env["WORLD_SIZE"] == "1"
