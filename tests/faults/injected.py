"""The real program, to be killed where the environment says."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from tests.faults.points import IN_WRITER, POINTS, Countdown, kill_after, kill_rank, kill_writer


def main() -> None:
    os.environ["FAULT_RANK_PID"] = str(os.getpid())
    fault = json.loads(os.environ.get("FAULT", "{}"))
    if int(os.environ["RANK"]) in fault.get("ranks", []):
        if fault["point"] == "any time":
            kill_after(fault["count"] / 1000)
        elif fault["point"] in IN_WRITER and "asynchronous" in fault["variant"]:
            from megatron_rw.resilience import writer

            writer._main = functools.partial(_writer_main, fault)
        else:
            POINTS[fault["point"]].install(Countdown(fault["count"]))
    import pretrain_gpt_rw

    pretrain_gpt_rw.main()


def _writer_main(fault: dict[str, Any], device: Any, rank_pid: int, *args: Any) -> None:
    from megatron_rw.resilience import writer

    os.environ["FAULT_RANK_PID"] = str(rank_pid)
    kill = kill_writer if fault["point"] == "writer" else kill_rank
    POINTS[fault["point"]].install(Countdown(fault["count"], kill))
    writer._main(device, rank_pid, *args)
