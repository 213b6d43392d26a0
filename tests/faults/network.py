"""A run over two hosts whose link is cut: two network namespaces of this machine.

    make network            # as root; or: python -m tests.faults.network

One rank in each, connected by a third that is their switch and that loses all packets from the
middle of the run on. For five seconds: the run goes on and ends as if nothing had been. For good:
both ranks end by themselves, within the timeout, with a line that names who is gone and a status
that is not 0.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.corpus import flags_of, write_corpus
from tests.hosts import INTERFACE, connected_hosts, plug
from tests.program import Run, run_program, steps_so_far

HOSTS = {"rw-a": "10.231.7.1", "rw-b": "10.231.7.2"}
TIMEOUT_MIN = 1
SHORT_S = 5.0
STEPS = 400
FLAGS = (
    f"--train-iters {STEPS} --micro-batch-size 4 --global-batch-size 8 "
    f"--distributed-timeout-minutes {TIMEOUT_MIN} --reweight-strategy linupper"
).split()


def run(folder: Path, disturb: Callable[[Any], bool] | None = None) -> Run:
    """A run, one rank on each host."""
    return run_program(
        folder,
        *(*flags_of(folder.parent / "corpus"), *FLAGS),
        processes=len(HOSTS),
        module="tests.faults.injected",
        disturb=disturb,
        patience=60 * TIMEOUT_MIN + 15,
        environment={
            "HOSTS": ",".join(HOSTS),
            "MASTER_ADDR": next(iter(HOSTS.values())),
            "GLOO_SOCKET_IFNAME": INTERFACE,
        },
    )


def losses(finished: Run) -> list[float]:
    return [record["lm_loss"] for record in finished.train_metrics()]


class Cut:
    """Loses all packets in the middle of a run, for some seconds or, with None, for good."""

    def __init__(self, folder: Path, seconds: float | None) -> None:
        self._folder, self._seconds = folder, seconds
        self.start = 0.0
        self.before = self.during = 0

    def __call__(self, _: Any) -> bool:
        """Cuts the link once the run has got that far."""
        if (self.before or steps_so_far(self._folder)) < STEPS // 4:
            return False
        self.start = time.monotonic()
        for host in HOSTS:
            plug(host, in_place=False)
        self.before = steps_so_far(self._folder)
        if self._seconds is not None:
            time.sleep(self._seconds)
            self.during = steps_so_far(self._folder) - self.before
            for host in HOSTS:
                plug(host, in_place=True)
        return True


def main() -> int:
    """Run both; exit status 1 if one did not go as it should."""
    with tempfile.TemporaryDirectory() as name, connected_hosts(HOSTS):
        folder = Path(name)
        write_corpus(folder / "corpus")

        undisturbed = run(folder / "undisturbed")
        print(f"undisturbed: {len(losses(undisturbed))} steps, statuses {undisturbed.status}")
        failed = undisturbed.status != [0, 0]

        cut = Cut(folder / "short", SHORT_S)
        short = run(folder / "short", cut)
        same = losses(short) == losses(undisturbed)
        print(
            f"cut for {SHORT_S:.0f} s after {cut.before} steps: {cut.during} steps meanwhile, "
            f"{len(losses(short))} in the end, statuses {short.status}, losses the same: {same}"
        )
        failed |= short.status != [0, 0] or not same or not cut.before or cut.during > 2

        cut = Cut(folder / "good", None)
        good = run(folder / "good", cut)
        seconds = time.monotonic() - cut.start
        print(f"cut for good: both ended after {seconds:.0f} s, statuses {good.status}")
        for rank, output in enumerate(good.output):
            found = re.search(r"^error: .*", output, re.MULTILINE)
            print(f"  rank {rank}: {found[0] if found else output[-500:]}")
            failed |= found is None
        failed |= good.hung or 0 in good.status or seconds > 60 * TIMEOUT_MIN
    print("failed" if failed else "as it should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
