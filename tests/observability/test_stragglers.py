"""The slow rank of a logging interval is named."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rw.observability.stragglers import SlowestRank, slowest
from tests.observability.disturbed import SLOW_S
from tests.program import run_program

FLAGS = (
    "--train-iters 4 --micro-batch-size 4 --global-batch-size 16 --log-interval 2 "
    "--log-slowest-rank"
).split()
LAYOUTS = {
    "two replicas": (2, ""),
    # Ranks 0 and 1 are the first stage; the second waits for them.
    "two pipelines of two": (4, "--pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_slow_rank_is_named(tmp_path: Path, data_flags: list[str], layout: str) -> None:
    processes, flags = LAYOUTS[layout]
    run = run_program(
        tmp_path,
        *data_flags,
        *FLAGS,
        *flags.split(),
        processes=processes,
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


HOSTS = ["a", "b", "c", "d"]


def table(*rows: tuple[int, float]) -> Any:
    return torch.tensor(rows).double()


def test_compares_within_a_pipeline_stage() -> None:
    """The last stage has the output layer and takes longer by right."""
    found = slowest(table((0, 1.0), (0, 1.5), (1, 4.0), (1, 5.0)), HOSTS)
    assert found == SlowestRank(1, "b", 1.5, 1.5)


def test_names_nobody_where_no_forward_pass_has_run() -> None:
    assert slowest(table((0, 0.0), (0, 0.0)), HOSTS) is None
