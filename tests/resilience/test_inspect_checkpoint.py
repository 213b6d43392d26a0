"""tools/inspect_checkpoint.py on checkpoints that the real program wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rw.resilience.inspect_checkpoint import main
from tests.program import run_program

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_checkpoint.py"
TRAIN = (
    "--train-iters 4 --micro-batch-size 4 --global-batch-size 8 --save-interval 2 "
    "--tensor-model-parallel-size 2 --verify-integrity --reweight-strategy linupper "
    "--reweight-warmup-steps 3"
).split()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    save = ["--save", str(folder / "checkpoints")]
    run_program(folder, *data_flags, *TRAIN, *save, processes=2).check()
    return folder / "checkpoints"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_it_prints_what_is_in_it(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(saved), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "iter_0000002: complete\niter_0000004: complete  <- tracker" in text
    assert "iteration 4, 32 samples" in text
    assert "saved by: processes 2, tensor 2, pipeline 1, context 1, expert 1, data 1" in text
    assert "num_layers 4, hidden_size 32" in text
    assert "reweighting: strategy linupper" in text
    assert "began at iteration 0" in text
    assert "output_layer.weight" in text
    assert "float32   64 x 32 (2 parts)" in text
    assert "checksums: all files are intact" in text


def test_it_prints_one_object(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(saved / "iter_0000002"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration"] == 2
    assert found["layout"]["tensor"] == 2
    assert found["arguments"]["hidden_size"] == 32
    assert found["reweighting"]["settings"]["strategy"] == "linupper"
    [weight] = [t for t in found["tensors"] if t["name"] == "output_layer.weight"]
    assert weight["shape"] == [64, 32]
    assert found["parameters"] == sum(
        t["shape"][0] * (t["shape"] + [1])[1] * (t["shape"] + [1, 1])[2]
        for t in found["tensors"]
        if not t["name"].startswith(("optimizer.", "rng_state"))
    )


def test_command_line(saved: Path) -> None:
    command = [sys.executable, str(TOOL), str(saved), "--iteration", "2", "--arguments"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "  reweight_strategy = linupper" in result.stdout


def test_a_changed_byte_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((copy / "iter_0000004").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main([str(copy), "--verify"]) == 1
    assert f"{shard.name}: hash mismatch" in capsys.readouterr().out


def test_incomplete(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "iter_0000004" / "metadata.json").unlink()
    assert main([str(copy)]) == 1
    captured = capsys.readouterr()
    assert "iter_0000004: it has no metadata.json" in captured.out
    assert "iter_0000004 is incomplete: it has no metadata.json" in captured.err


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ("", ["--iteration", "3"], "no checkpoint of iteration 3; it has 2, 4"),
        ("integrity.json", ["--verify"], "it was saved without --verify-integrity"),
        ("all", [], "has no checkpoints (folders iter_0000123)"),
    ],
)
def test_what_is_not_there(
    change: str, flags: list[str], message: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in copy.glob("iter_*"):
        if change == "all":
            shutil.rmtree(path)
        elif change:
            (path / change).unlink()
    with pytest.raises(SystemExit, match="2"):
        main([str(copy), *flags])
    assert message in capsys.readouterr().err


def test_another_model_is_refused_with_what_differs(saved: Path, data_flags: list[str]) -> None:
    run = run_program(
        saved.parent / "other",
        *(*data_flags, *TRAIN, "--load", str(saved), "--num-layers", "3", "--hidden-size", "64"),
        *("--ffn-hidden-size", "96"),
        processes=2,
    )
    [error] = [line for line in run.output[0].splitlines() if line.startswith("error: ")]
    assert "is a checkpoint of another model: --num-layers 4 there, 3 here" in error
    assert "--hidden-size 32 there, 64 here; --ffn-hidden-size 64 there, 96 here" in error
    assert "or --use-checkpoint-args to take them from it" in error
