"""The preflight, on ranks with faults that the environment names, as {"fault": {"rank": value}}."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
import types
from typing import Any

import torch
import torch.distributed as dist


def main() -> None:
    """Run it."""
    from megatron_rw.errors import UserError
    from megatron_rw.preflight import command, facts, messages

    rank = os.environ["RANK"]
    faults = {
        name: ranks[rank]
        for name, ranks in json.loads(os.environ.get("PREFLIGHT_FAULTS", "{}")).items()
        if rank in ranks
    }
    if "absent" in faults:
        return
    host = faults.get("host", "node0")
    socket.gethostname = lambda: host
    if "clock" in faults:
        vars(messages)["time"] = types.SimpleNamespace(time=lambda: time.time() + faults["clock"])
    if "torch" in faults:
        torch.__version__ = faults["torch"]
    if "file_size" in faults:
        try_to_save = facts.try_to_save
        facts.try_to_save = lambda save: _limited(faults["file_size"], try_to_save, save)
    if "refusal" in faults:
        from megatron_rw.preflight import rank as rank_checks

        def refuse(*_: object) -> None:
            raise UserError(faults["refusal"])

        rank_checks.check_job = refuse  # type: ignore[assignment]
    all_reduce = dist.all_reduce

    def faulty(message: torch.Tensor) -> None:
        if "stuck" in faults:
            time.sleep(600)
        if "dead" in faults:
            os._exit(9)
        message *= faults.get("scale", 1)
        all_reduce(message)

    dist.all_reduce = faulty  # type: ignore[assignment]
    command.main()


def _limited(size: int, function: Any, save: str | None) -> Any:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        return function(save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
