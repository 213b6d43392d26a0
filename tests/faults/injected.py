"""The real program, to be killed where the environment says."""

from __future__ import annotations

import json
import os

from tests.faults.points import POINTS, Countdown, kill_after


def main() -> None:
    """Run it."""
    os.environ["FAULT_RANK_PID"] = str(os.getpid())
    fault = json.loads(os.environ.get("FAULT", "{}"))
    if int(os.environ["RANK"]) in fault.get("ranks", []):
        if fault["point"] == "any time":
            kill_after(fault["count"] / 1000)
        else:
            install, _ = POINTS[fault["point"]]
            install(Countdown(fault["count"]))
    import pretrain_gpt_rw

    pretrain_gpt_rw.main()
