"""Cost of reweighting: step time in every scope over step time without, interleaved in one run.

Runs the real program on the quick start's model and data (`make quickstart` first): once with its
own batch, one micro-batch a rank, and once with that batch cut into two. With one, the scope
`global` is `microbatch` and left out. What weighs the samples is switched from step to step,
through all orders in turn, so that drift of the machine and after-effects of a step hit all
alike; everything else stays the same. Each rank keeps to one core. A step lasts from one call of
Megatron's `train_step` to the next and so includes the logging. Prints, by scope, the median over
blocks of steps of its step's time over that of the step without, and a 95 % bootstrap interval, and
writes both as JSON.

    make bench-step-time
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# By micro-batches a rank.
VARIANTS = {
    1: ("none", "microbatch", "deferred"),
    2: ("none", "microbatch", "global", "deferred"),
}
# All orders equally often.
BLOCKS = 240
# The first steps warm caches and allocators up.
SKIPPED_BLOCKS = 4
# The batch is the quick start's own.
PROCESSES, BATCH_SIZE = 2, 32


def variant(step: int, variants: Sequence[str]) -> str:
    """What weighs the samples in a step."""
    orders = list(itertools.permutations(variants))
    block, position = divmod(step, len(variants))
    return orders[block % len(orders)][position]


def worker() -> None:
    """One rank: the program with alternating scopes and a clock round its steps."""
    # A rank that changes cores makes the other wait, in any scope.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    import pretrain_gpt_rw
    from megatron_rw.platform import select_device

    select_device(["--device", "cpu"])
    from megatron.training import training

    from megatron_rw.integrations.state import ReweightState
    from megatron_rw.integrations.step import StepReweighting
    from megatron_rw.reweighting import ReweightConfig
    from megatron_rw.training import loss

    variants = VARIANTS[int(os.environ["STEP_TIME_MICRO_BATCHES"])]
    by_variant: dict[str, StepReweighting | None] = {"none": None}
    switched: list[loss.PretrainLoss] = []
    original_init = loss.PretrainLoss.__init__

    def init(self: loss.PretrainLoss, args: Any, config: ReweightConfig, *rest: Any) -> None:
        original_init(self, args, config, *rest)
        switched.append(self)
        for scope in variants[1:]:
            scoped = dataclasses.replace(config, scope=cast(Any, scope))
            by_variant[scope] = StepReweighting(
                scoped,
                ReweightState(scoped),
                lambda: int(args.curr_iteration),
                self.weight_metrics.add,
            )

    loss.PretrainLoss.__init__ = init  # type: ignore[method-assign, assignment]

    starts: list[float] = []
    original_step = training.train_step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        [pretrain_loss] = switched
        pretrain_loss.reweighting = by_variant[variant(len(starts), variants)]
        starts.append(time.perf_counter())
        return original_step(*args, **kwargs)

    training.train_step = timed_step
    pretrain_gpt_rw.main()
    if os.environ["RANK"] == "0":
        seconds = [end - start for start, end in itertools.pairwise(starts)]
        Path(os.environ["STEP_TIME_OUTPUT"]).write_text(json.dumps(seconds))


def summarise(seconds: Sequence[float], variants: Sequence[str]) -> dict[str, Any]:
    """Median of the ratios within blocks, and a bootstrap interval for it, by scope."""
    size = len(variants)
    blocks = []
    for first in range(SKIPPED_BLOCKS * size, len(seconds) - size + 1, size):
        steps = range(first, first + size)
        blocks.append({variant(step, variants): seconds[step] for step in steps})
    rng = random.Random(0)
    result: dict[str, Any] = {
        "blocks": len(blocks),
        "median_step_ms_none": 1000 * statistics.median(block["none"] for block in blocks),
    }
    for scope in variants[1:]:
        ratios = [block[scope] / block["none"] for block in blocks]
        medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
        result[scope] = {
            "ratio": statistics.median(ratios),
            "ratio_low": medians[50],
            "ratio_high": medians[1950],
        }
    return result


def measure(micro_batches: int) -> dict[str, Any]:
    """Run the ranks and summarise."""
    from examples.quickstart import run as quickstart

    out = ROOT / "quickstart"
    raw = out / "step_time.json"
    steps = (SKIPPED_BLOCKS + BLOCKS) * len(VARIANTS[micro_batches]) + 1
    flags = quickstart.training_flags(out, out / "runs" / "step_time")
    # Neither evaluation nor a checkpoint may fall between two steps that are compared.
    flags += ["--train-iters", str(steps), "--eval-interval", str(10 * steps), "--eval-iters", "1"]
    micro_batch_size = str(BATCH_SIZE // PROCESSES // micro_batches)
    flags += ["--global-batch-size", str(BATCH_SIZE), "--micro-batch-size", micro_batch_size]
    flags += quickstart.RUNS["linupper"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), __file__, "--worker", *flags]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "STEP_TIME_OUTPUT": str(raw),
        "STEP_TIME_MICRO_BATCHES": str(micro_batches),
    }
    with (out / "step_time.log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    return summarise(json.loads(raw.read_text()), VARIANTS[micro_batches])


def main() -> int:
    """Measure both batch shapes, print and write the result."""
    if not (ROOT / "quickstart" / "data" / "train" / "domains.json").exists():
        print("error: no quick-start data; run make quickstart first", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "benchmark": "step time by scope over none, linupper, quick-start model",
        "command": "make bench-step-time",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores, {PROCESSES} processes",
        "python": platform.python_version(),
    }
    for micro_batches, variants in VARIANTS.items():
        summary = measure(micro_batches)
        result[f"micro_batches_{micro_batches}"] = summary
        print(
            f"{micro_batches} micro-batch(es) a rank, {summary['blocks']} blocks; a step without "
            f"reweighting takes {summary['median_step_ms_none']:.0f} ms"
        )
        for scope in variants[1:]:
            found = summary[scope]
            print(
                f"{scope:>10} / none: {found['ratio']:.4f} "
                f"(95 % interval {found['ratio_low']:.4f} to {found['ratio_high']:.4f})"
            )
    result_file = ROOT / "benchmarks" / "results" / "step_time.json"
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.argv.remove("--worker")
        worker()
    else:
        sys.exit(main())
