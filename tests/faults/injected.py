"""The real program, disturbed where the environment says.

FAULT, as JSON, is when which ranks are killed, a `campaign.Fault`. RANK_LIMITS has the bytes beyond
which each rank's files cannot grow, as under a quota, 0 for no limit. These two meet the process
that writes a rank's checkpoints where that is another one. HOSTS has the network namespaces that
ranks run in. STEP_SECONDS is what every iteration takes at least.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.faults.points import IN_WRITER, POINTS, kill_after


def main() -> None:
    """Runs it."""
    rank, has_writer = int(os.environ.get("RANK", "0")), "--async-save" in sys.argv
    if hosts := os.environ.get("HOSTS"):
        with open(f"/run/netns/{hosts.split(',')[rank]}") as namespace:
            os.setns(namespace.fileno(), os.CLONE_NEWNET)
    limits = os.environ.get("RANK_LIMITS")
    if limits and (limit := int(limits.split(",")[rank])):
        # Not the rank: it hands its tensors over in shared memory, which is made of files.
        disturb(functools.partial(limit_files, limit), in_writer=has_writer)
    fault = json.loads(os.environ.get("FAULT", "{}"))
    if rank in fault.get("ranks", []):
        point, number = fault["point"], fault["count"]
        if point == "any time":
            kill_after(number / 1000)
        else:
            install, in_writer = POINTS[point].install, has_writer and point in IN_WRITER
            # The two points of the writer's process are one place, and differ in who is killed.
            others = (os.getpid(),) if in_writer and point != "writer" else ()
            disturb(functools.partial(install, number, *others), in_writer)
    import pretrain_gpt_rw
    from megatron_rw.resilience.watchdog import Progress

    begin = Progress.begin

    def begin_later(progress: Any, iteration: int, doing: str) -> None:
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        begin(progress, iteration, doing)

    with mock.patch.object(Progress, "begin", begin_later):
        pretrain_gpt_rw.main()


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def disturb(disturbance: Callable[[], None], in_writer: bool) -> None:
    """Calls a function now, or in the process that will write this rank's checkpoints."""
    if not in_writer:
        disturbance()
        return
    from megatron_rw.resilience import writer

    writer._main = functools.partial(_writer_main, disturbance)


def _writer_main(disturbance: Callable[[], None], *args: Any) -> None:
    from megatron_rw.resilience import writer

    disturbance()
    writer._main(*args)


if __name__ == "__main__":
    main()
