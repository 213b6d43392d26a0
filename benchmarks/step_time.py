"""Cost of reweighting: step time with it over step time without, interleaved in one run.

Runs the real program on the quick start's model and data (`make quickstart` first). Its loss
function is switched between `none` and `linupper` from step to step in the order A B B A, so that
drift of the machine hits both alike; everything else stays the same. A step lasts from one call of
Megatron's `train_step` to the next and so includes the logging. Prints the median of the ratios of
neighbouring steps and its 95 % bootstrap interval, and writes them as JSON.

    make bench-step-time
"""

from __future__ import annotations

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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS = 804
# The first steps warm caches and allocators up.
SKIPPED = 4
PROCESSES = 2


def _is_reweighted(iteration: int) -> bool:
    return iteration % 4 in (1, 2)


def worker() -> None:
    """One rank: the program with an alternating loss and a clock round its steps."""
    import pretrain_gpt_rw
    from megatron_rw.platform import select_device

    select_device(["--device", "cpu"])
    from megatron.training import training

    from megatron_rw.reweighting import ReweightConfig
    from megatron_rw.training import loss

    class AlternatingLoss(loss.PretrainLoss):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            on = _is_reweighted(self._args.curr_iteration)
            self._config = self._on if on else ReweightConfig()
            return super().__call__(*args, **kwargs)

        def __init__(self, args: Any, config: ReweightConfig, *rest: Any) -> None:
            super().__init__(args, config, *rest)
            self._on = config

    loss.PretrainLoss = AlternatingLoss  # type: ignore[misc, assignment]

    starts: list[float] = []
    original = training.train_step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        starts.append(time.perf_counter())
        return original(*args, **kwargs)

    training.train_step = timed_step
    pretrain_gpt_rw.main()
    if os.environ["RANK"] == "0":
        seconds = [end - start for start, end in itertools.pairwise(starts)]
        Path(os.environ["STEP_TIME_OUTPUT"]).write_text(json.dumps(seconds))


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median of the ratios of neighbouring steps, and a bootstrap interval for it."""
    ratios = []
    for first in range(SKIPPED, len(seconds) - 1, 2):
        pair = {_is_reweighted(i): seconds[i] for i in (first, first + 1)}
        ratios.append(pair[True] / pair[False])
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    without = [s for i, s in enumerate(seconds) if i >= SKIPPED and not _is_reweighted(i)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": medians[50],
        "ratio_high": medians[1950],
        "pairs": len(ratios),
        "median_step_ms_none": 1000 * statistics.median(without),
    }


def main() -> int:
    """Start the ranks, summarise and write the result."""
    from examples.quickstart import run as quickstart

    out = ROOT / "quickstart"
    if not (out / "data" / "train" / "domains.json").exists():
        print("error: no quick-start data; run make quickstart first", file=sys.stderr)
        return 2
    result_file = ROOT / "benchmarks" / "results" / "step_time.json"
    raw = out / "step_time.json"
    flags = quickstart.training_flags(out, out / "runs" / "step_time")
    # Neither evaluation nor a checkpoint may fall between two steps that are compared.
    flags += ["--train-iters", str(STEPS), "--eval-interval", str(10 * STEPS), "--eval-iters", "1"]
    flags += quickstart.RUNS["linupper"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), __file__, "--worker", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STEP_TIME_OUTPUT": str(raw)}
    with (out / "step_time.log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)

    summary = summarise(json.loads(raw.read_text()))
    result = {
        "benchmark": "step time, linupper over none, quick-start model",
        "command": "make bench-step-time",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores, {PROCESSES} processes",
        "python": platform.python_version(),
        **summary,
    }
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"linupper / none: {summary['ratio']:.4f} "
        f"(95 % interval {summary['ratio_low']:.4f} to {summary['ratio_high']:.4f}, "
        f"{summary['pairs']:.0f} pairs of steps of {summary['median_step_ms_none']:.0f} ms)"
    )
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
