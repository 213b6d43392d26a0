"""Kernels that cannot be compiled on one rank end all ranks, and rank 0 names that one."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

import pytest
import torch

from megatron_rw.kernels.options import BackendError
from tests.program import run_program

FLAGS = "--train-iters 1 --micro-batch-size 8 --reweight-strategy linupper".split()
PROBLEM = "NVRTC is missing: install it"


def lacking(ranks: str) -> None:
    """Lets some ranks fail to compile the kernels; on the others there is nothing to compile."""
    from megatron_rw.kernels import cuda_launch

    def compiles(device: torch.device) -> None:
        if os.environ["RANK"] in ranks:
            raise BackendError(PROBLEM)

    cuda_launch.launcher = compiles  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("ranks", "named"), [("1", f"rank 1 on {socket.gethostname()}: "), ("01", "")]
)
def test_one_rank_ends_all(ranks: str, named: str, tmp_path: Path, data_flags: list[str]) -> None:
    run = run_program(
        tmp_path,
        *(*data_flags, *FLAGS, "--reweight-kernels", "cuda"),
        processes=2,
        prepare=functools.partial(lacking, ranks),
    )
    assert run.status == [2, 2], run.all_output
    assert not run.hung
    errors = [line for line in run.all_output.splitlines() if "error: " in line]
    assert errors == [f"error: {named}{PROBLEM}"]
    assert "building GPT model" not in run.all_output
    assert "Traceback" not in run.all_output


def test_a_run_that_uses_no_kernels_does_not_ask_for_them(
    tmp_path: Path, data_flags: list[str]
) -> None:
    flags = [*data_flags, *FLAGS[:-2]]
    kernels = {"MEGATRON_RW_KERNELS": "cuda"}
    prepare = functools.partial(lacking, "0")
    run_program(tmp_path, *flags, prepare=prepare, environment=kernels).check()
