"""tools/inspect_checkpoint.py on checkpoints that the real program wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_rw.resilience.inspect_checkpoint import main
from tests.program import run_program

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
    assert main([str(saved), "--verify", "--arguments"]) == 0
    text = capsys.readouterr().out
    assert "iter_0000002: complete\niter_0000004: complete  <- tracker" in text
    assert "iteration 4, 32 samples" in text
    assert "saved by: processes 2, tensor 2, pipeline 1, context 1, expert 1, data 1" in text
    assert "num_layers 4, hidden_size 32" in text
    assert "reweighting: strategy linupper" in text
    assert "began at iteration 0" in text
    assert "output_layer.weight" in text
    assert "float32   64 x 32 (2 parts)" in text
    assert "  reweight_strategy = linupper" in text
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
