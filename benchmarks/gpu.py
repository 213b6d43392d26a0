r"""Everything that wants a GPU, in one command on a bare machine: `make gpu`.

Runs the kernels' tests on the device, then the benchmarks, and prints their tables once more at the
end. Needs Python 3.12 with torch 2.11, triton 3.6, numpy, pytest and hypothesis, and nvcc 13.0 for
the CUDA kernels; wheels found in benchmarks/wheels are unpacked for it, without touching the
installation:

    pip download --no-deps --only-binary=:all: -d benchmarks/wheels \
        megatron-core==0.19.2 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 \
        transformer-engine==2.20.2

(Add --python-version, --implementation and --platform when the GPU machine is another than this
one.) What is missing is left out and said to be. Results go to benchmarks/results, or to --output.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "benchmarks" / "wheels"
# Without its compiled libraries Megatron takes it for broken; peers.py reads it as a file.
NOT_INSTALLED = "transformer_engine"


@dataclass(frozen=True)
class Stage:
    """One command, its part of the time, and whether the others make sense without it."""

    name: str
    command: tuple[str, ...]
    share: float
    required: bool = False


def stages(output: Path, budget: float, gpu: str) -> list[Stage]:
    """What to run within `budget` seconds on a GPU, the results in a folder."""
    kernels = "benchmarks/kernels"
    model = re.sub("[^a-z0-9]+", "_", gpu.lower())

    def result(name: str) -> str:
        return str(output / f"{name}_{model}.json")

    def bench(script: str, *arguments: str) -> tuple[str, ...]:
        return (script, *arguments, "--output", result(Path(script).stem))

    shapes = ("--budget-s", str(0.25 * budget))
    return [
        Stage("tests", ("-m", "pytest", "-q", *kernel_tests()), 0.3, True),
        Stage("cross-entropy", bench(f"{kernels}/cross_entropy.py", *shapes), 0.35),
        Stage("plot", (f"{kernels}/plot.py", result("cross_entropy")), 0.1),
        Stage("output layer", bench(f"{kernels}/linear_cross_entropy.py", *shapes), 0.35),
        Stage("weighting", bench(f"{kernels}/weighting.py"), 0.1),
        Stage("loss path", bench("benchmarks/loss_path.py"), 0.1),
        Stage("end to end", bench("benchmarks/end_to_end.py"), 0.2),
        *(
            Stage(
                f"tune {backend}",
                (f"{kernels}/tune.py", "--backend", backend, "--output", result(f"tune_{backend}")),
                0.2,
            )
            for backend in ("triton", "cuda")
        ),
    ]


def kernel_tests() -> tuple[str, ...]:
    """Pytest's arguments; in several processes where pytest-xdist is installed."""
    # The one left out starts the program on the CPU.
    chosen = ("tests/kernels", "--deselect", "tests/kernels/test_in_program.py")
    share = ("-n", "8") if find_spec("xdist") else ("-x",)
    return (*chosen, "-p", "no:cacheprovider", *share)


def environment(folder: Path) -> dict[str, str]:
    """With the wheels on the path."""
    wheels = [str(path) for path in WHEELS.glob("*.whl") if NOT_INSTALLED not in path.name]
    path = [str(ROOT)]
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--target", str(folder), *wheels]
        subprocess.run(command, check=True)
        path.insert(0, str(folder))
    if "PYTHONPATH" in os.environ:
        path.append(os.environ["PYTHONPATH"])
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def main() -> int:
    """Run the stages; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="stages to run, separated by commas")
    parser.add_argument("--budget-s", type=float, default=540.0, help="for all stages together")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: no GPU is visible; the tests without one are `make test`", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    tables: list[str] = []
    failed: list[str] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(Path(folder) / "site")
        for stage in stages(options.output, options.budget_s, torch.cuda.get_device_name()):
            if options.only and stage.name not in options.only.split(","):
                continue
            left = options.budget_s - (time.perf_counter() - start)
            log = options.output / f"{stage.name.replace(' ', '_')}.log"
            status = _run(stage, variables, log, min(left, stage.share * options.budget_s + 60))
            tables.append(f"--- {stage.name}: {status}\n{log.read_text()[-6000:]}")
            if status != "done":
                failed.append(stage.name)
                if stage.required:
                    break
    print("\n".join(["", *tables]))
    print(f"\n{torch.cuda.get_device_name()}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def _run(stage: Stage, variables: dict[str, str], log: Path, limit: float) -> str:
    if limit < 20:
        log.write_text("")
        return "no time left"
    with log.open("w") as stream:
        try:
            command = [sys.executable, *stage.command]
            process = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=stream, stderr=stream, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    return "done" if process.returncode == 0 else f"exit status {process.returncode}"


if __name__ == "__main__":
    sys.exit(main())
