"""The benchmarks run, write what they measured and find our results right; times mean nothing."""

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


def benchmark(
    script: str, *arguments: str, emulated: bool = False
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    # Nothing is timed in earnest: compiling and interpreting would take most of the time.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0"}
    environment.pop("MEGATRON_RW_CUDA_LIBRARY", None)
    if emulated and not torch.cuda.is_available():
        environment["MEGATRON_RW_CUDA_LIBRARY"] = str(emulation.library())
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def record(path: Path) -> Any:
    return json.loads(path.read_text())


def test_cross_entropy(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run = benchmark(
        "kernels/cross_entropy.py",
        *["--device", "cpu", "--shapes", "256x100,128x64", "--rounds", "3"],
        *["--output", str(output)],
    )
    assert run.returncode == 0, run.stderr
    found = record(output)
    assert found["versions"]["torch"]
    assert [shape["tokens"] for shape in found["shapes"]] == [256, 128]
    for shape in found["shapes"]:
        implementations = shape["implementations"]
        for name in ("ours", "torch eager", "Megatron"):
            assert implementations[name]["loss_error"] < 1e-5, name
            assert implementations[name]["gradient_error"] < 1e-5, name
            assert implementations[name]["both"]["median"] > 0, name
    plotted = benchmark("kernels/plot.py", str(output))
    assert plotted.returncode == 0, plotted.stderr
    assert output.with_suffix(".png").stat().st_size > 1000


def test_output_layer(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run = benchmark(
        "kernels/linear_cross_entropy.py",
        *["--device", "cpu", "--shapes", "256x16x3000", "--rounds", "3", "--output", str(output)],
    )
    assert run.returncode == 0, run.stderr
    [shape] = record(output)["shapes"]
    implementations = shape["implementations"]
    names = ("ours", "ours, 1/4 of the logits", "core, core's loss", "core, our loss")
    for name in names:
        for error in ("loss_error", "hidden_error", "weight_error"):
            assert implementations[name][error] < 1e-5, (name, error)
        assert implementations[name]["both"]["median"] > 0, name
    assert implementations["floor"]["tflop_per_s"] > 0
    assert shape["logits_bytes"] == 256 * 3000 * 4


def test_weighting(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run = benchmark(
        "kernels/weighting.py", "--device", "cpu", "--rounds", "2", "--output", str(output)
    )
    assert run.returncode == 0, run.stderr
    assert [size["samples"] for size in record(output)["sizes"]] == [32, 512, 4096, 16384, 65536]


def test_loss_path(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run = benchmark("loss_path.py", "--device", "cpu", "--rounds", "2", "--output", str(output))
    assert run.returncode == 0, run.stderr
    variants = record(output)["variants"]
    assert list(variants)[:2] == ["megatron, none", "megatron, linupper"]
    for variant in variants.values():
        assert variant["operators"] > 10
        assert variant["host_microseconds"] > 0
    assert variants["torch, linupper"]["operators"] > variants["torch, none"]["operators"]


@pytest.mark.long
def test_loss_path_of_the_emulated_kernels(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run = benchmark("loss_path.py", "--device", "cpu", "--emulated", "--output", str(output))
    assert run.returncode == 0, run.stderr
    operators = {name: row["operators"] for name, row in record(output)["variants"].items()}
    # Statistics, combine, gradient and weights are an operator each.
    assert operators["cuda, linupper"] < operators["torch, linupper"] / 3


def test_tune(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run = benchmark(
        "kernels/tune.py",
        *["--device", "cpu", "--backend", "cuda", "--shapes", "4x40", "--rounds", "2"],
        *["--output", str(output)],
        emulated=True,
    )
    assert run.returncode == 0, run.stderr
    found = record(output)
    assert set(found["best"]) == {"forward", "backward", "probabilities"}
    assert found["in_use"]["forward_threads"] in (128, 256, 512, 1024)


@pytest.fixture(scope="module")
def corpus_and_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    corpus = tmp_path_factory.mktemp("corpus")
    write_jsonl(corpus / "c.jsonl.gz", [{"text": text} for text in make_texts(200, 0)])
    prefix = tmp_path_factory.mktemp("model") / "bpe"
    train = ["--input", f"{corpus}/c.jsonl.gz", "--output-prefix", str(prefix)]
    train_tokenizer.main([*train, "--vocab-size", "340"])
    return str(corpus), f"{prefix}.model"


def test_preprocess(corpus_and_model: tuple[str, str], tmp_path: Path) -> None:
    # Megatron-LM's script is in no package: what it makes of the same text is compared by hand.
    corpus, model = corpus_and_model
    output = tmp_path / "result.json"
    run = benchmark(
        "preprocess.py",
        *["--corpus", corpus, "--megabytes", "0.2", "--tokenizer-model", model],
        *["--workers", "1", "2", "--rounds", "1", "--output", str(output)],
    )
    assert run.returncode == 0, run.stderr
    found = record(output)
    assert 200_000 <= found["text_bytes"] < 201_000
    assert found["documents"] > 200  # the corpus is repeated
    assert not found["outputs_identical"]  # nothing was compared
    assert "/" not in found["command"].replace("benchmarks/preprocess.py", "")
    for workers in ("1", "2"):
        rates = found["workers"][workers]
        assert 1 < rates["ours"]["median_peak_mib"] < 10_000
        assert 0 < rates["throughput, ours over bare tokenizer"] < 1
    assert "ours" in run.stdout


def test_long_document(corpus_and_model: tuple[str, str], tmp_path: Path) -> None:
    corpus, model = corpus_and_model
    output = tmp_path / "result.json"
    run = benchmark(
        "long_document.py",
        *["--corpus", corpus, "--megabytes", "2", "--tokenizer-model", model],
        *["--rounds", "1", "--output", str(output)],
    )
    assert run.returncode == 0, run.stderr
    found = record(output)
    assert found["characters"] >= 1_900_000
    (ours,), (whole,) = found["runs"]["ours"], found["runs"]["library, whole"]
    assert ours["peak_bytes"] < whole["peak_bytes"] / 2
    assert min(ours["cpu_s"], whole["cpu_s"]) > 0


@pytest.mark.long
def test_end_to_end() -> None:
    run = benchmark("end_to_end.py", "--tiny", "--blocks", "2")
    assert run.returncode == 0, run.stderr
    assert "microbatch+fused / none+fused" in run.stdout
    assert "none+layer / none+fused" in run.stdout


def test_gpu_suite_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    run = benchmark("gpu.py")
    assert run.returncode == 2
    assert run.stderr.startswith("error: no GPU is visible")
