"""How the processes find each other: torchrun's variables, srun's, or a single process."""

import os
import socket
import warnings
from collections.abc import MutableMapping

from megatron_rw.errors import UserError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def complete_environment(env: MutableMapping[str, str] = os.environ) -> None:
    """Fills in what torch.distributed reads from the environment.

    torchrun sets all of it. Under `srun` with one task per GPU the ranks come from SLURM, and the
    first task's node serves as master. Otherwise this is a run of one process. What a launcher
    left out is a `UserError`.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in _NEEDED if name not in env]
        if missing:
            raise _error(
                f"RANK or WORLD_SIZE is set, but {', '.join(missing)} is not: start with torchrun, "
                "or unset both for a run of one process."
            )
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not env[name].isdecimal():
                raise _error(f"{name}={env[name]} is no number: start with torchrun.")
        if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
            raise _error(
                f"RANK={env['RANK']} is none of the ranks 0 to {int(env['WORLD_SIZE']) - 1} that "
                f"WORLD_SIZE={env['WORLD_SIZE']} has: start with torchrun."
            )
        return
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env["RANK"] = env["SLURM_PROCID"]
        env["WORLD_SIZE"] = env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", _slurm_master(env))
        # Jobs of different users may share a node; the same job must agree on the port.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        return
    env.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env.setdefault("MASTER_PORT", str(probe.getsockname()[1]))


def _error(message: str) -> UserError:
    """Returns an error that only this rank may know of."""
    return UserError(message, known_to_all=False)


def _slurm_master(env: MutableMapping[str, str]) -> str:
    if env.get("SLURM_NNODES", "1") == "1":
        return "127.0.0.1"
    # srun sets it for every task. Inside sbatch it is the first node, where task 0 runs.
    address = env.get("SLURM_LAUNCH_NODE_IPADDR")
    if address is None:
        raise _error(
            "several SLURM nodes, but no master address: export MASTER_ADDR=$(scontrol show "
            'hostnames "$SLURM_JOB_NODELIST" | head -n 1) before srun.'
        )
    return address


def prepare_process(env: MutableMapping[str, str] = os.environ) -> None:
    """Completes the environment, and silences library warnings except on rank 0."""
    complete_environment(env)
    if env["RANK"] != "0":
        warnings.filterwarnings("ignore")
