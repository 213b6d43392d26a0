"""Estimates are Megatron's own, and its checkpoints are as large as is said."""

from __future__ import annotations

import json
import re
from argparse import Namespace
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


BIG = ["--global-batch-size", "64", "--bf16"]


def estimated(gpus: int, flags: list[str]) -> tuple[Any, str]:
    from megatron_rw.observability.memory import remedies
    from megatron_rw.preflight.estimate import estimate, planned_arguments

    args = planned_arguments([*MODEL, *TRAINING, *SHAPE, *RUN, *BIG, *flags], gpus)
    return estimate(args), remedies(args)


def test_plan_for_gpus_that_are_not_here() -> None:
    cut = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
    (one, advised), (sharded, advised_sharded), (parts, _) = (
        run_ranks(1, estimated, 8, flags)[0] for flags in ([], ["--use-distributed-optimizer"], cut)
    )
    assert one.gpus == sharded.gpus == 8
    assert one.tokens == 2 * 64 * 32
    assert one.parameters == parts.parameters > 1e6
    # Of Adam's 12 bytes a parameter each of 8 replicas keeps an eighth: 7.5 bytes for 18.
    assert sharded.weights_bytes == pytest.approx(one.weights_bytes * 7.5 / 18)
    assert advised.startswith("--use-distributed-optimizer, a --micro-batch-size below 2")
    assert advised_sharded.startswith("a --micro-batch-size below 2")


def test_says_what_the_formula_leaves_out() -> None:
    from megatron_rw.preflight.estimate import limits

    args = Namespace(
        bf16=True, fp16=False, transformer_impl="transformer_engine", recompute_granularity=None,
        sequence_parallel=False, context_parallel_size=1, num_experts=None,
        use_megatron_fsdp=False, use_torch_fsdp2=False,
    )  # fmt: skip
    always = limits(args)
    assert len(always) == 1
    for name, value, words in (
        ("bf16", False, "take 4 in fp32"),
        ("transformer_impl", "local", "local keeps attention's scores"),
        ("recompute_granularity", "full", "full recomputation is not in the formula"),
        ("sequence_parallel", True, "in the formula with --recompute-activations alone"),
        ("context_parallel_size", 2, "--context-parallel-size is not in"),
        ("num_experts", 4, "activations of experts are not in"),
        ("use_torch_fsdp2", True, "FSDP is not in the formula"),
    ):
        [added] = limits(Namespace(**(vars(args) | {name: value})))[1:]
        assert words in added


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
