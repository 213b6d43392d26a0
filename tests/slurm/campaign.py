"""examples/slurm/pretrain.sbatch in a real SLURM, through what ends jobs.

    make slurm              # as root; or: python -m tests.slurm.campaign [NAME ...]

Two nodes with two processes each, on the CPU, of the program with a small model. A job that meets
its time limit, whose nodes die one after the other, or that is signalled under torchrun, must be
requeued and end with the losses and parameters of one that was left alone, bit for bit. One that
gets a wrong flag must end at once. Prints a line each; exit status 1 if one is not as it should be.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.corpus import flags_of, write_corpus
from tests.faults.campaign import Undisturbed
from tests.hosts import INTERFACE
from tests.program import MODEL, TRAINING, Run, steps_so_far
from tests.slurm.cluster import NODES, Cluster, running_cluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples/slurm/pretrain.sbatch"
STEPS, SAVE_INTERVAL = 300, 40
PROGRAM = (
    f"--train-iters {STEPS} --micro-batch-size 4 --global-batch-size 16 --save-interval "
    f"{SAVE_INTERVAL} --hidden-dropout 0.1 --attention-dropout 0.1 --distributed-timeout-minutes 2 "
    "--reweight-strategy linupper --reweight-temperature 0.4"
).split()
SIZES = "--nodes=2 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=0".split()
PATIENCE_S = 400.0


@dataclass(frozen=True)
class Job:
    """A job in a cluster, whose run writes to a folder."""

    cluster: Cluster
    directory: Path
    number: str

    def field(self, name: str) -> str:
        """What SLURM says of it: `JobState`, `Restarts`, `ExitCode`, ..."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found is not None, shown
        return found[1]

    def wait_for(self, reached: Callable[[], bool], what: str) -> None:
        """Until something is the case."""

        def failed() -> str:
            state = f"job {self.number} ({self.field('JobState')}) did not {what}"
            return f"{state}\n{self.output()[-3000:]}\n{self.cluster.logs()}"

        wait_until(reached, failed, PATIENCE_S)

    def wait_for_steps(self, number: int) -> None:
        """Until it has logged so many, those that were done twice counted twice."""
        self.wait_for(lambda: steps_so_far(self.directory) >= number, "train")

    def wait_for_restart(self, number: int = 1) -> None:
        """Until SLURM has put it back into the queue so many times."""
        self.wait_for(lambda: self.field("Restarts") == str(number), "be requeued")

    def wait(self) -> tuple[str, str]:
        """Its state in the end, and how often it was restarted."""
        final = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.field("JobState") in final, "end")
        return self.field("JobState"), self.field("Restarts")

    def output(self) -> str:
        """What it has printed."""
        log = self.directory.with_suffix(".log")
        return log.read_text() if log.exists() else "no log"


class Campaign:
    """Runs the jobs in a cluster that is free, and has their runs write below a folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        write_corpus(folder / "corpus")
        self._undisturbed: Undisturbed | None = None

    def undisturbed(self) -> str:
        """What the others are compared with."""
        job = self._job("undisturbed")
        ended = job.wait()
        if ended != ("COMPLETED", "0"):
            return f"WRONG: {ended}\n{job.output()[-3000:]}"
        self._undisturbed = Undisturbed(Run([0], [], job.directory), STEPS)
        return f"ok, {STEPS} steps"

    def time_limit(self) -> str:
        """SLURM's signal before the time limit; the requeued job gets enough time."""
        # The signal comes after 60 to 90 s, and the whole run takes longer than that.
        limit = ("--time=2", "--signal=USR1@30")
        job = self._job("time_limit", *limit, INTERFACE=INTERFACE, STEP_SECONDS="0.3")
        job.wait_for_restart()
        self._cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        return self._compared(job, repeats=0)

    def node_failure(self) -> str:
        """Each node dies in turn, the one with the batch script last, and comes back."""
        job = self._job("node_failure")
        waited = []
        for number, node in enumerate(reversed(NODES), 1):
            # A checkpoint, and steps that are lost.
            lost = SAVE_INTERVAL // 2
            job.wait_for_steps(steps_so_far(job.directory) + SAVE_INTERVAL + lost)
            self._cluster.kill(node)
            start = time.monotonic()
            job.wait_for_restart(number)
            waited.append(f"{time.monotonic() - start:.0f} s")
            self._cluster.boot(node)
        outcome = self._compared(job, repeats=2 * SAVE_INTERVAL)
        return f"{outcome}, requeued {' and '.join(waited)} after a node died"

    def torchrun(self) -> str:
        """A signal to a step that is torchrun's; a user may send it too."""
        job = self._job("torchrun", LAUNCHER="torchrun", INTERFACE=INTERFACE)
        job.wait_for_steps(SAVE_INTERVAL)
        self._cluster.run("scancel", "--signal=USR1", job.number)
        return self._compared(job, repeats=0)

    def bad_flag(self) -> str:
        """Refused by the program, and not requeued."""
        job = self._job("bad_flag", flags=("--reweight-strategy", "nonsense"))
        seen = (*job.wait(), job.field("ExitCode"))
        line = re.search("^.*--reweight-strategy.*", job.output(), re.MULTILINE)
        if seen != ("FAILED", "0", "2:0") or line is None:
            return f"WRONG: {seen}\n{job.output()[-3000:]}"
        return f"ok, FAILED with status 2, no restart: {line[0].strip()}"

    def _job(self, name: str, *options: str, flags: Sequence[str] = (), **environment: str) -> Job:
        directory = self._folder / name
        log = [f"--job-name={name}", f"--output={directory}.log"]
        command = ["sbatch", "--parsable", *SIZES, *log, *options, SCRIPT, *MODEL, *TRAINING]
        variables: dict[str, Any] = {
            "RUN": str(directory),
            "PROGRAM": str(ROOT / "tests/faults/injected.py"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "STEP_SECONDS": "0.05",
            **environment,
        }
        every = [*command, *PROGRAM, *flags_of(self._folder / "corpus"), *flags]
        return Job(self._cluster, directory, self._cluster.run(*every, **variables).strip())

    def _compared(self, job: Job, repeats: int) -> str:
        state, restarts = job.wait()
        if state != "COMPLETED" or restarts == "0":
            return f"WRONG: {state} after {restarts} restarts\n{job.output()[-3000:]}"
        assert self._undisturbed is not None
        problem, again = self._undisturbed.compared(Run([0], [], job.directory))
        if problem or again > repeats:
            log = re.findall("^.*(?:rror: |queue).*", job.output(), re.MULTILINE)
            return "\n".join([problem or f"WRONG: {again} steps were done twice", *log])
        return f"ok, {restarts} restarts, {again} steps done twice, all bitwise the same"


def main() -> int:
    """Runs the jobs that are named, or all, after the undisturbed one."""
    names = sys.argv[1:] or ["time_limit", "node_failure", "torchrun", "bad_flag"]
    failed = False
    with tempfile.TemporaryDirectory() as folder, running_cluster() as cluster:
        campaign = Campaign(cluster, Path(folder))
        for name in ("undisturbed", *names):
            start = time.monotonic()
            outcome = getattr(campaign, name)()
            print(f"{name:14}{time.monotonic() - start:5.0f} s  {outcome}", flush=True)
            failed |= not outcome.startswith("ok")
            if name == "undisturbed" and failed:
                break
            cluster.wait_until_ready()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
