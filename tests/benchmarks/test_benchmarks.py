"""Each benchmark runs at its smallest and writes its results; times mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rw.data import train_tokenizer
from tests.data.conftest import make_texts, write_jsonl
from tests.kernels import emulation

ROOT = Path(__file__).resolve().parents[2]
CPU = "--device cpu --rounds 2"
# Script and flags, and what its results hold at least.
SMALLEST = {
    "cross-entropy": (f"kernels/cross_entropy.py {CPU} --shapes 128x64", "shapes versions"),
    "output layer": (f"kernels/linear_cross_entropy.py {CPU} --shapes 64x16x300", "shapes"),
    "weighting": (f"kernels/weighting.py {CPU}", "sizes"),
    "loss path": (f"loss_path.py {CPU}", "variants"),
    "loss path, emulated": (f"loss_path.py {CPU} --emulated", "variants"),
    "tune": (f"kernels/tune.py {CPU} --backend cuda --shapes 4x40", "best in_use"),
    "preprocess": (
        "preprocess.py --corpus {corpus} --megabytes 0.2 --tokenizer-model {model} "
        "--workers 1 2 --rounds 1",
        "workers documents",
    ),
    "long document": (
        "long_document.py --corpus {corpus} --megabytes 1 --tokenizer-model {model} --rounds 1",
        "runs characters",
    ),
}


def benchmark(arguments: str, *more: str, emulated: bool = False) -> str:
    """Runs a script to its end."""
    # Compiling and interpreting would take most of the time.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0"}
    environment.pop("MEGATRON_RW_CUDA_LIBRARY", None)
    if emulated and not torch.cuda.is_available():
        environment["MEGATRON_RW_CUDA_LIBRARY"] = str(emulation.library())
    script, *flags = arguments.split()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags, *more]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "c.jsonl.gz", [{"text": text} for text in make_texts(200, 0)])
    prefix = tmp_path_factory.mktemp("model") / "bpe"
    train = ["--input", f"{folder}/c.jsonl.gz", "--output-prefix", str(prefix)]
    train_tokenizer.main([*train, "--vocab-size", "340"])
    return {"corpus": str(folder), "model": f"{prefix}.model"}


@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs_and_writes_its_results(name: str, tmp_path: Path, places: dict[str, str]) -> None:
    arguments, keys = SMALLEST[name]
    output = tmp_path / "result.json"
    emulated = name in ("tune", "loss path, emulated")
    assert benchmark(arguments.format(**places), "--output", str(output), emulated=emulated)
    found: dict[str, Any] = json.loads(output.read_text())
    assert all(found[key] for key in keys.split())
    if name == "cross-entropy":
        benchmark(f"kernels/plot.py {output}")
        assert output.with_suffix(".png").stat().st_size > 1000


@pytest.mark.long
def test_end_to_end() -> None:
    assert "microbatch+fused / none+fused" in benchmark("end_to_end.py --tiny --blocks 2")
