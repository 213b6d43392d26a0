"""The preflight, on ranks with faults that the environment names, as {"fault": {"rank": value}}."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist


def main() -> None:
    """Run it."""
    from megatron_rw.errors import UserError
    from megatron_rw.preflight import command, facts

    rank = os.environ["RANK"]
    faults = {
        name: ranks[rank]
        for name, ranks in json.loads(os.environ["PREFLIGHT_FAULTS"]).items()
        if rank in ranks
    }
    if "absent" in faults:
        return
    host = faults.get("host", "node0")
    socket.gethostname = lambda: host
    torch.__version__ = faults.get("torch", torch.__version__)
    if "save" in faults:
        facts.try_to_save = lambda save: (None, faults["save"])
    if "refusal" in faults:
        from megatron_rw.preflight import rank as rank_checks

        def refuse(*_: object) -> Any:
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
