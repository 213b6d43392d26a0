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
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.corpus import flags_of, write_corpus
from tests.faults.points import POINTS, inject
from tests.faults.undisturbed import Undisturbed
from tests.program import Run, run_program

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
    """What happens to a run."""

    variant: str
    point: str  # One of `POINTS`, or `any time`.
    count: int  # How often the point is reached before; milliseconds for `any time`.
    ranks: tuple[int, ...]  # Those that are killed.

    def __str__(self) -> str:
        when = f"{self.count} ms" if self.point == "any time" else f"no. {self.count}"
        who = "all ranks" if len(self.ranks) == PROCESSES else f"rank {self.ranks[0]}"
        return f"{self.variant:30}{self.point:12}{when:>10}  {who}"


def faults(seed: int, trials: int) -> Iterator[Fault]:
    """Random ones: every point in turn, and every third at any time."""
    rng = random.Random(seed)
    points = itertools.cycle(POINTS)
    variants = list(VARIANTS)
    for trial in range(trials):
        point = "any time" if trial % 3 == 2 else next(points)
        if point == "any time":
            count = rng.randrange(int(1000 * SECONDS))
        else:
            count = rng.randint(1, POINTS[point].most)
        ranks = rng.choice([(0,), (1,), (0, 1)])
        if point != "any time" and POINTS[point].on_rank_0:
            ranks = (0,)
        choice = [v for v in variants if point != "writer" or "asynchronous" in v]
        yield Fault(rng.choice(choice), point, count, ranks)


class Campaign:
    def __init__(self, folder: Path, data_flags: list[str]) -> None:
        self._folder, self._data_flags = folder, data_flags
        self.undisturbed: dict[str, Undisturbed] = {}

    def trial(self, fault: Fault, number: int) -> str:
        """What came of it: `ok` and how, or what went wrong."""
        undisturbed = self.expected(fault.variant)
        directory = self._folder / f"trial{number}"
        start = time.monotonic()
        run = self._run(directory, fault.variant, fault)
        disturbed = any(status != 0 for status in run.status)
        if run.hung:
            return f"HUNG: {run.status}, a rank did not notice in {PATIENCE_S:.0f} s"
        attempts = 1
        while any(status != 0 for status in run.status):
            if attempts == ATTEMPTS:
                return f"LOST: {run.status} after {ATTEMPTS} attempts\n{run.output[0][-1500:]}"
            attempts += 1
            run = self._run(directory, fault.variant, None)
            if run.hung:
                return f"HUNG at restart {attempts - 1}: {run.status}"
        problem, _ = undisturbed.compared(run)
        if problem:
            return problem
        shutil.rmtree(directory)
        again = f"{attempts} attempts" if disturbed else "not reached"
        return f"ok, {again}, {time.monotonic() - start:.0f} s"

    def expected(self, variant: str) -> Undisturbed:
        if variant not in self.undisturbed:
            run = self._run(self._folder / variant.replace(" ", "_"), variant, None).check()
            self.undisturbed[variant] = Undisturbed(run, ITERATIONS)
        return self.undisturbed[variant]

    def _run(self, directory: Path, variant: str, fault: Fault | None) -> Run:
        checkpoints = str(directory / "checkpoints")
        return run_program(
            directory,
            *(*self._data_flags, *COMMON, *VARIANTS[variant].split()),
            *("--save", checkpoints, "--load", checkpoints),
            *("--data-cache-path", str(directory / "cache")),
            processes=PROCESSES,
            prepare=functools.partial(inject, asdict(fault) if fault else None),
            patience=PATIENCE_S,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one trial")
    options = parser.parse_args()
    failed = done = 0
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        write_corpus(corpus)
        campaign = Campaign(Path(name), flags_of(corpus))
        for number, fault in enumerate(faults(options.seed, options.trials)):
            if options.only is not None and number != options.only:
                continue
            outcome = campaign.trial(fault, number)
            print(f"{number:3}  {fault}  {outcome}", flush=True)
            done += 1
            failed += not outcome.startswith("ok")
    print(f"{done} trials with seed {options.seed}: {done - failed} ok, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
