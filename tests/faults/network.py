"""A run over two hosts whose link is cut: two network namespaces of this machine.

    make network            # as root; or: python -m tests.faults.network

One rank in each, connected by a third that is their switch and that loses all packets from the
middle of the run on. For five seconds: the run goes on and ends as if nothing had been. For good:
both ranks end by themselves, within the timeout, with a line that names who is gone and a status
that is not 0.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.corpus import flags_of, write_corpus
from tests.hosts import INTERFACE, connected_hosts, plug
from tests.program import MODEL, TRAINING

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"rw-a": "10.231.7.1", "rw-b": "10.231.7.2"}
TIMEOUT_MIN = 1
# From the start to the first steps, on a slow machine.
PATIENCE_S = 120.0
SHORT_S = 5.0
STEPS = 400


def plug_all(in_place: bool) -> None:
    for host in HOSTS:
        plug(host, in_place)


class Ranks:
    """A run, one rank on each host."""

    def __init__(self, folder: Path, data_flags: list[str]) -> None:
        folder.mkdir()
        self.logs = [folder / f"rank{rank}.log" for rank in range(2)]
        self.metrics = folder / "metrics.jsonl"
        flags = [
            *(*MODEL, *TRAINING, *data_flags, "--log-dir", str(folder)),
            *f"--train-iters {STEPS} --micro-batch-size 4 --global-batch-size 8".split(),
            *f"--distributed-timeout-minutes {TIMEOUT_MIN} --reweight-strategy linupper".split(),
        ]
        self.processes = []
        for rank, host in enumerate(HOSTS):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": next(iter(HOSTS.values())),
                "MASTER_PORT": "29400",
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", host, sys.executable, "pretrain_gpt_rw.py", *flags]
            with self.logs[rank].open("w") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
                )

    def steps(self) -> int:
        return len(self.losses())

    def losses(self) -> list[float]:
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().splitlines()
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record["lm_loss"] for record in records if record["type"] == "train"]

    def wait_for(self, steps: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.steps() < steps:
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                raise SystemExit(f"error: the run did not begin\n{self.output(0)[-2000:]}")
            time.sleep(0.05)

    def wait(self, seconds: float) -> list[int | None]:
        """Statuses, None of a process that had to be killed."""
        deadline = time.monotonic() + seconds
        statuses: list[int | None] = []
        for process in self.processes:
            try:
                statuses.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                statuses.append(None)
        return statuses

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text()


def main() -> int:
    """Run both; exit status 1 if one did not go as it should."""
    failed = False
    with tempfile.TemporaryDirectory() as name, connected_hosts(HOSTS):
        folder = Path(name)
        write_corpus(folder / "corpus")
        data_flags = flags_of(folder / "corpus")

        undisturbed = Ranks(folder / "undisturbed", data_flags)
        statuses = undisturbed.wait(PATIENCE_S + 60)
        print(f"undisturbed: {undisturbed.steps()} steps, statuses {statuses}")
        failed |= statuses != [0, 0]

        run = Ranks(folder / "short", data_flags)
        run.wait_for(STEPS // 4)
        plug_all(in_place=False)
        before = run.steps()
        time.sleep(SHORT_S)
        during = run.steps() - before
        plug_all(in_place=True)
        statuses = run.wait(PATIENCE_S)
        same = run.losses() == undisturbed.losses()
        print(
            f"cut for {SHORT_S:.0f} s after {before} steps: {during} steps meanwhile, "
            f"{run.steps()} in the end, statuses {statuses}, losses the same: {same}"
        )
        failed |= statuses != [0, 0] or not same or during > 2

        run = Ranks(folder / "good", data_flags)
        run.wait_for(STEPS // 4)
        plug_all(in_place=False)
        start = time.monotonic()
        statuses = run.wait(60 * TIMEOUT_MIN + 15)
        seconds = time.monotonic() - start
        print(f"cut for good: both ended after {seconds:.0f} s, statuses {statuses}")
        for rank in range(2):
            found = re.search(r"^error: .*", run.output(rank), re.MULTILINE)
            print(f"  rank {rank}: {found[0] if found else run.output(rank)[-500:]}")
            failed |= found is None
        failed |= None in statuses or 0 in statuses or seconds > 60 * TIMEOUT_MIN
    print("failed" if failed else "as it should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
