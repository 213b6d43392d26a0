r"""Everything that wants a GPU, in one command on a bare machine: `make gpu`.

Our kernels against fp64 at large shapes, their tests, launch shapes, the comparisons with others,
training with and without reweighting, the sanitizers. A stage writes its results as it goes and
ends at its limit; a failure stops no other. `--rehearse` runs all of them on the CPU. The results
are at most eight files: a table as JSON each, a plot, and the output of all stages.

Needs Python 3.12 with torch 2.11, numpy, pytest and hypothesis. `make gpu` has it find what else is
in benchmarks/wheels, without touching the installation:

    pip download --no-deps --only-binary=:all: -d benchmarks/wheels megatron-core==0.19.2 \
        cuda-core tyro docstring-parser typeguard psutil sentencepiece tensorboard \
        liger-kernel==0.8.5 cut-cross-entropy==25.1.1 transformer-engine==2.20.2 \
        quack-kernels==0.6.5 nvidia-cutlass-dsl{,-libs-base,-libs-core,-libs-cu13}==4.8.1 \
        apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 einops
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TextIO
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    """Commands and their share of the time; SECONDS in them becomes what they may take."""

    name: str
    share: float
    commands: Sequence[Sequence[str]]


def stages(output: Path, model: str, rehearse: bool) -> list[Stage]:
    """What runs, in order; the shares add up to 1."""
    python, small = sys.executable, ("--rehearse", "--rounds", "2") if rehearse else ()

    def bench(script: str, result: str, *arguments: str) -> tuple[str, ...]:
        file = str(output / f"{result}_{model}.json")
        return (python, f"benchmarks/{script}.py", *arguments, *small, "--output", file)

    def compare(kind: str, result: str, *arguments: str) -> tuple[str, ...]:
        return bench("kernels/compare", result, kind, "--budget-s", "SECONDS", *arguments)

    tests = ["tests/kernels/test_weights.py"] if rehearse else ["tests/kernels", "-m", "not long"]
    # The one left out trains on the CPU.
    tests += ["--ignore", "tests/kernels/test_in_program.py", "-p", "no:cacheprovider"]
    tests += ["-n", "2" if rehearse else "8"] if find_spec("xdist") else []
    watch = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    watches = [()] if rehearse else [(*watch, tool) for tool in tools]
    exercise = (python, "-m", "tests.kernels.exercise")
    return [
        Stage("correctness", 0.1, [compare(kind, "", "--check") for kind in ("logits", "layer")]),
        Stage("tests", 0.18, [(python, "-m", "pytest", "-q", *tests)]),
        Stage("launches", 0.07, [compare("launches", "launches")]),
        Stage("cross-entropy", 0.15, [compare("logits", "cross_entropy")]),
        Stage("output layer", 0.14, [compare("layer", "linear_cross_entropy")]),
        Stage("weighting", 0.04, [compare("weighting", "weighting")]),
        Stage("plot", 0.02, [compare("plot", "cross_entropy")]),
        Stage("end to end", 0.16, [bench("end_to_end", "end_to_end")]),
        Stage("loss path", 0.05, [bench("loss_path", "loss_path")]),
        Stage("sanitizers", 0.09, [("env", *watch, *exercise) for watch in watches]),
    ]


def run(chosen: Sequence[Stage], budget: float, log: Path, given: Mapping[str, str]) -> list[str]:
    """Run stages, each to the end of its share of the budget at the latest; those that failed."""
    start, shares, failed = time.monotonic(), 0.0, []
    for stage in chosen:
        shares += stage.share / sum(stage.share for stage in chosen)
        ended = []
        for command in stage.commands:
            left = max(0.0, start + shares * budget - time.monotonic())
            line = [part.replace("SECONDS", f"{0.8 * left:.0f}") for part in command]
            with log.open("a+", errors="replace") as stream:
                before = stream.tell()
                print(f"\n--- {stage.name}: {shlex.join(line)}", file=stream, flush=True)
                ended.append(execute(line, left, stream, given))
                stream.seek(before)
                print(stream.read()[-5000:])
        now = time.monotonic() - start
        print(f"=== {stage.name}: {', '.join(ended)}; at {now:.0f} s", flush=True)
        failed += [stage.name] if set(ended) != {"done"} else []
    return failed


def execute(line: Sequence[str], seconds: float, log: TextIO, given: Mapping[str, str]) -> str:
    """Run a command, and end all that it started; how it ended."""
    mark = uuid4().hex
    environment = {**given, "MEGATRON_RW_STAGE": mark}
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        status = process.wait(seconds)
        return f"exit status {status}" if status else "done"
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # torchrun starts its ranks in sessions of their own. A process that the driver holds does
        # not end, and must not keep the next stage from starting.
        last = time.monotonic() + 5
        while (found := marked(mark)) and time.monotonic() < last:
            for number in found:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Processes that have the mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        # It may have ended, or belong to another.
        with suppress(OSError):
            found += [int(path.parent.name)] if mark.encode() in path.read_bytes() else []
    return found


def main() -> int:
    """Run the stages; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="stages to run, separated by commas")
    parser.add_argument("--budget-s", type=float, default=540.0, help="for all stages together")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: no measurement")
    options = parser.parse_args()
    import torch

    if not (options.rehearse or torch.cuda.is_available()):
        print("error: no GPU is visible; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    model, output = re.sub("[^a-z0-9]+", "_", name.lower()), options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen, log = stages(output, model, options.rehearse), output / f"gpu_{model}.txt"
    if options.only:
        by_name = {stage.name: stage for stage in chosen}
        chosen = [by_name[name] for name in options.only.split(",")]
    else:
        log.unlink(missing_ok=True)
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    tools = f"{os.environ['PATH']}:/usr/local/cuda/bin"
    # Compiling would take most of a rehearsal.
    added = {"TORCHDYNAMO_DISABLE": "1"} if options.rehearse else {}
    added |= {"PYTHONPATH": path, "PATH": tools, "PYTHONUNBUFFERED": "1"}
    failed = run(chosen, options.budget_s, log, os.environ | added)
    log.write_text(log.read_text(errors="replace").replace(f"{ROOT}/", ""))
    print(f"\n{name}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
