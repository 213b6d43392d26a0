"""The benchmarks run at their smallest and write their results; times mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu
from megatron_rw.data import train_tokenizer
from tests.data.conftest import make_texts, write_jsonl

SMALLEST = (
    "preprocess.py --corpus {corpus} --megabytes 0.2 --tokenizer-model {model} --workers 1 2",
    "long_document.py --corpus {corpus} --megabytes 1 --tokenizer-model {model}",
)
# Starts a process in a session of its own, as torchrun does, and waits for ever.
HANGS = """
import subprocess, sys
command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(1000)"]
subprocess.run([*command, sys.argv[1]], start_new_session=True)
"""


def benchmark(arguments: str, *more: str) -> str:
    """Runs a script to its end."""
    script, *flags = arguments.split()
    command = [sys.executable, str(gpu.ROOT / "benchmarks" / script), *flags, *more]
    run = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "c.jsonl.gz", [{"text": text} for text in make_texts(200, 0)])
    prefix = tmp_path_factory.mktemp("model") / "bpe"
    train = ["--input", f"{folder}/c.jsonl.gz", "--output-prefix", str(prefix)]
    train_tokenizer.main([*train, "--vocab-size", "340"])
    return {"corpus": str(folder), "model": f"{prefix}.model"}


@pytest.mark.parametrize("arguments", SMALLEST)
def test_it_runs_and_writes_its_results(arguments: str, tmp_path: Path, places: Any) -> None:
    output = tmp_path / "result.json"
    assert benchmark(arguments.format(**places), "--rounds", "1", "--output", str(output))
    assert json.loads(output.read_text())["versions"]


def test_every_stage_for_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    printed = benchmark("gpu.py --rehearse", "--output", str(tmp_path))
    files = {path.name.removesuffix("_rehearsal.json"): path for path in tmp_path.iterdir()}
    assert len(files) <= 8
    for name in "launches linear_cross_entropy weighting end_to_end loss_path".split():
        text = files[name].read_text()
        assert json.loads(text)["rehearsal"] is True
        assert str(tmp_path) not in text
    assert json.loads(files["cross_entropy"].read_text())["missing"].keys() >= {"Liger", "quack"}
    assert all(f"=== {stage.name}: done" in printed for stage in gpu.stages(tmp_path, "", True))


def test_a_stage_ends_at_its_limit_with_all_it_started(tmp_path: Path) -> None:
    log, python = tmp_path / "log", [sys.executable, "-c"]
    stages = [
        gpu.Stage("hangs", 0.5, [[*python, HANGS, str(log)]]),
        gpu.Stage("fails", 0.1, [[*python, "raise SystemExit(3)"], ["env", "no-such-tool"]]),
        gpu.Stage("works", 0.4, [[*python, "print('SECONDS left')"]]),
    ]
    assert gpu.run(stages, 6.0, log, os.environ) == ["hangs", "fails"]
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if command and str(log) in command]
    assert all(part in log.read_text() for part in ("begun\n", "no-such-tool", " left\n"))
