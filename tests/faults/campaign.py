"""Kill the real program at random points, restart it, and compare with a run that nobody disturbed.

    make faults            # or: python -m tests.faults.campaign --trials 60 --seed 0

Every trial sends SIGKILL to one rank or to all at a seeded random point: in the forward pass, the
backward pass, the optimizer, between two tensors of a checkpoint, between the renames that complete
one, while the tracker is written, in the middle of an index of the data, or at any time; or to the
process that writes a rank's checkpoints, alone. Then it starts the same command again. The losses
of every iteration that ran, of every attempt, and the final checkpoint must be those of the
undisturbed run, bit for bit; ranks that are left must end by themselves. Prints a line a trial and
the count. Exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.corpus import flags_of, write_corpus
from tests.faults.points import POINTS
from tests.program import Run, run_program, without_time

ITERATIONS, SAVE_INTERVAL, PROCESSES = 12, 3, 2
COMMON = (
    f"--train-iters {ITERATIONS} --save-interval {SAVE_INTERVAL} --micro-batch-size 4 "
    "--global-batch-size 16 --distributed-timeout-minutes 1 --eval-interval 5 "
    "--hidden-dropout 0.1 --attention-dropout 0.1 "
    "--reweight-strategy linupper --reweight-temperature 0.4 --reweight-warmup-steps 8 "
    "--reweight-warmup-schedule linear"
).split()
ASYNC = "--async-save --async-strategy mcore --use-persistent-ckpt-worker"
VARIANTS = {
    "synchronous": "",
    "asynchronous": ASYNC,
    "distributed optimizer": "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    "--reweight-scope deferred --reweight-moment-decay 0.5",
    "tensor parallel, asynchronous": f"--tensor-model-parallel-size 2 {ASYNC}",
}
# How long ranks that are left may take to notice: twice the timeout, where one waits for a rank 0
# that was never there. And how often one may have to start again.
PATIENCE_S, ATTEMPTS = 150.0, 4
# An undisturbed run takes about this long; "any time" is within.
SECONDS = 3.0


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    Attributes:
        point: One of `POINTS`, or `any time`.
        count: Which time the point is reached, from 1; milliseconds for `any time`.
        ranks: Those that are killed.
    """

    variant: str
    point: str
    count: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        """For the table."""
        when = f"{self.count} ms" if self.point == "any time" else f"no. {self.count}"
        who = "all ranks" if len(self.ranks) == PROCESSES else f"rank {self.ranks[0]}"
        return f"{self.variant:30}{self.point:12}{when:>10}  {who}"


def faults(seed: int, trials: int) -> Iterator[Fault]:
    """Random ones: every point in turn, and every third at any time."""
    rng = random.Random(seed)
    points = itertools.cycle(POINTS)
    for trial in range(trials):
        name = "any time" if trial % 3 == 2 else next(points)
        point = POINTS.get(name)
        count = rng.randint(1, point.most if point else int(1000 * SECONDS))
        ranks = rng.choice([(0,), (1,), (0, 1)])
        if point and point.on_rank_0:
            ranks = (0,)
        variants = [v for v in VARIANTS if name != "writer" or "asynchronous" in v]
        yield Fault(rng.choice(variants), name, count, ranks)


class Undisturbed:
    """The losses and the parameters of a run that nobody disturbed."""

    def __init__(self, run: Run, iterations: int) -> None:
        self.run = run
        self.records = [without_time(record) for record in run.train_metrics()]
        self._parameters = run.checkpoint(iterations)
        assert [record["iteration"] for record in self.records] == list(range(1, iterations + 1))

    def compared(self, run: Run) -> tuple[str, int]:
        """Compares every iteration of every attempt of a run, and its final checkpoint.

        Returns:
            What is wrong with it, or nothing, and how many iterations were done again.
        """
        records = [without_time(record) for record in run.train_metrics()]
        for record in records:
            if record != self.records[record["iteration"] - 1]:
                return f"WRONG: iteration {record['iteration']} is not the undisturbed run's", 0
        seen = {record["iteration"] for record in records}
        if len(seen) != len(self.records):
            return f"LOST: iterations {sorted(seen)} were logged", 0
        for name, tensor in run.checkpoint(len(seen)).items():
            if not torch.equal(tensor, self._parameters[name]):
                return f"WRONG: {name} of the final checkpoint", 0
        return "", len(records) - len(seen)


class Campaign:
    """Runs trials, below a folder."""

    def __init__(self, folder: Path, data_flags: list[str]) -> None:
        self._folder, self._data_flags = folder, data_flags
        self.expected = functools.cache(self._expected)

    def trial(self, fault: Fault) -> str:
        """What came of it: `ok` and how, or what went wrong."""
        undisturbed = self.expected(fault.variant)
        directory = self._folder / "trial"
        shutil.rmtree(directory, ignore_errors=True)
        start = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            run = self._run(directory, fault.variant, fault if attempt == 1 else None)
            if run.hung:
                return f"HUNG in attempt {attempt}: {run.status}, not noticed in {PATIENCE_S:.0f} s"
            if not any(run.status):
                break
        else:
            return f"LOST: {run.status} after {ATTEMPTS} attempts\n{run.output[0][-1500:]}"
        problem, _ = undisturbed.compared(run)
        how = f"{attempt} attempts" if attempt > 1 else "not reached"
        return problem or f"ok, {how}, {time.monotonic() - start:.0f} s"

    def _expected(self, variant: str) -> Undisturbed:
        run = self._run(self._folder / variant.replace(" ", "_"), variant)
        return Undisturbed(run.check(), ITERATIONS)

    def _run(self, directory: Path, variant: str, fault: Fault | None = None) -> Run:
        checkpoints = str(directory / "checkpoints")
        return run_program(
            directory,
            *(*self._data_flags, *COMMON, *VARIANTS[variant].split()),
            *("--save", checkpoints, "--load", checkpoints),
            *("--data-cache-path", str(directory / "cache")),
            processes=PROCESSES,
            module="tests.faults.injected",
            patience=PATIENCE_S,
            environment={"FAULT": json.dumps(asdict(fault))} if fault else None,
        )


def main() -> int:
    """Run the campaign, print a line a trial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one trial")
    options = parser.parse_args()
    failed = done = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        campaign = Campaign(folder, flags_of(folder / "corpus"))
        for number, fault in enumerate(faults(options.seed, options.trials)):
            if options.only is not None and number != options.only:
                continue
            outcome = campaign.trial(fault)
            print(f"{number:3}  {fault}  {outcome}", flush=True)
            done += 1
            failed += not outcome.startswith("ok")
    print(f"{done} trials with seed {options.seed}: {done - failed} ok, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
