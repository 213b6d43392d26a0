"""The slow rank of a logging interval is named."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from megatron_rw.training.callbacks.stragglers import SlowestRank, slowest
from tests.observability.disturbed import SLOW_S
from tests.program import run_program

# Ranks 0 and 1 are the first pipeline stage; the second waits for them.
FLAGS = (
    "--train-iters 4 --micro-batch-size 4 --global-batch-size 16 --log-interval 2 "
    "--log-slowest-rank --pipeline-model-parallel-size 2"
).split()


def test_the_slow_rank_is_named(tmp_path: Path, data_flags: list[str]) -> None:
    run = run_program(
        tmp_path,
        *data_flags,
        *FLAGS,
        processes=4,
        module="tests.observability.disturbed",
        environment={"SLOW_RANK": "1"},
    ).check()
    # The first interval has what a process does once, for however long.
    last = run.train_metrics()[-1]["slowest_rank"]
    assert (last["rank"], last["host"]) == (1, socket.gethostname())
    assert last["ratio"] > 1.5
    passes = 2 * 16 // 4 // 2  # two steps of the global batch, over two replicas
    assert last["seconds"] >= passes * SLOW_S
    assert (
        f"slowest rank: 1 on {socket.gethostname()}, {last['ratio']:.2f} of the median forward "
        f"time ({last['seconds']:.3f} s), up to iteration 4"
    ) in run.output[-1]
    assert "slowest" not in run.train_metrics()[0], "of the line after the first step"


def test_compares_within_a_pipeline_stage() -> None:
    """The last stage has the output layer and takes longer by right."""
    table = torch.tensor([[0, 1.0], [0, 1.5], [1, 4.0], [1, 5.0]])
    assert slowest(table, ["a", "b", "c", "d"]) == SlowestRank(1, "b", 1.5, 1.5)
    assert slowest(torch.zeros(2, 2), ["a", "b"]) is None, "no forward pass has run"
