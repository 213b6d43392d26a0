"""Estimates are Megatron's own, and its checkpoints are as large as is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.program import MODEL, TRAINING, run_program
from tests.ranks import run_ranks

# So large that what a checkpoint holds besides tensors does not count.
SHAPE = (
    "--hidden-size 128 --ffn-hidden-size 512 --vocab-size 4000 --tokenizer-type NullTokenizer "
    "--mock-data"
).split()
RUN = "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --save-interval 2".split()


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], marks=pytest.mark.long),
        pytest.param(["--use-distributed-optimizer"], marks=pytest.mark.long),
        pytest.param(["--no-save-optim"], marks=pytest.mark.long),
        ["--bf16"],
    ],
    ids=["fp32", "distributed-optimizer", "weights-alone", "bf16"],
)
def test_memory_and_checkpoint_are_those_of_a_run(extra: list[str], tmp_path: Path) -> None:
    save = tmp_path / "checkpoints"
    flags = [*SHAPE, *RUN, *extra, "--save", str(save), "--data-cache-path", str(tmp_path / "c")]
    run = run_program(tmp_path / "run", *flags, processes=2).check()
    found = run_program(
        tmp_path / "preflight",
        *(*flags, "--json", str(tmp_path / "report.json")),
        processes=2,
        module="megatron_rw.preflight.command",
        metrics=False,
    ).check()
    assert "a checkpoint takes about" in found.output[0]
    needed = json.loads((tmp_path / "report.json").read_text())["estimate"]
    said = re.search(
        r"weight and optimizer=([\d.]+) MB, activation=([\d.]+) MB", "\n".join(run.output)
    )
    assert said is not None
    assert needed["weights_bytes"] / 2**20 == pytest.approx(float(said[1]), abs=0.006)
    assert needed["activation_bytes"] / 2**20 == pytest.approx(float(said[2]), abs=0.006)
    on_disk = sum(file.stat().st_size for file in save.rglob("*") if file.is_file())
    assert needed["checkpoint_bytes"] == pytest.approx(on_disk, rel=0.1)


def estimated(gpus: int, flags: list[str]) -> dict[str, Any]:
    import dataclasses

    from megatron_rw.preflight.config import planned_arguments
    from megatron_rw.preflight.estimate import advice, estimate

    args = planned_arguments([*MODEL, *TRAINING, *SHAPE, *RUN, *flags], gpus)
    needed = estimate(args)
    assert needed is not None
    return dataclasses.asdict(needed) | {"advice": advice(args)}


BIG = ["--global-batch-size", "64", "--bf16"]


def test_plan_for_gpus_that_are_not_here() -> None:
    [one] = run_ranks(1, estimated, 8, BIG)
    [sharded] = run_ranks(1, estimated, 8, [*BIG, "--use-distributed-optimizer"])
    assert one["gpus"] == sharded["gpus"] == 8
    assert one["tokens"] == 2 * 64 * 32
    # Of Adam's 12 bytes a parameter each of 8 replicas keeps an eighth: 7.5 bytes for 18.
    assert sharded["weights_bytes"] == pytest.approx(one["weights_bytes"] * 7.5 / 18)
    assert one["advice"].startswith("--use-distributed-optimizer, a --micro-batch-size below 2")
    assert sharded["advice"].startswith("a --micro-batch-size below 2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bf16"], "too low by CUDA's context"),
        ([], "take 4 in fp32"),
        (["--bf16", "--transformer-impl", "local"], "local keeps attention's scores"),
        (
            "--bf16 --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1".split(),
            "full recomputation is not in the formula",
        ),
        (
            "--bf16 --tensor-model-parallel-size 2 --sequence-parallel".split(),
            "--sequence-parallel is in the formula with --recompute-activations alone",
        ),
        ("--bf16 --context-parallel-size 2".split(), "--context-parallel-size is not in"),
    ],
)
def test_says_what_the_formula_leaves_out(flags: list[str], words: str) -> None:
    [found] = run_ranks(1, estimated, 8, ["--global-batch-size", "64", *flags])
    assert any(words in limit for limit in found["limits"]), found["limits"]
    assert len(found["limits"]) == (1 if words.startswith("too low") else 2)


def test_parameters_do_not_depend_on_the_layout() -> None:
    cut = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
    [whole], [parts] = (run_ranks(1, estimated, 8, [*BIG, *extra]) for extra in ([], cut))
    assert whole["parameters"] == parts["parameters"] > 1e6


def test_command(tmp_path: Path) -> None:
    run = run_program(
        tmp_path,
        *(*SHAPE, *RUN, *BIG, "--estimate", "8", "--device-memory-gib", "0.01"),
        *("--peak-tflops", "100", "--assumed-mfu", "0.5"),
        module="megatron_rw.preflight.command",
        metrics=False,
    )
    assert run.status == [1]
    assert "estimate for 8 GPUs by Megatron's formulas, nothing of it measured" in run.output[0]
    assert "h at 50% of 100 TFLOP/s a GPU, which is assumed" in run.output[0]
    assert "problem: more than the 0.01 GiB of a GPU" in run.output[0]
