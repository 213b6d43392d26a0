"""The preflight in real processes over gloo: what is wrong on one rank is found, and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.errors import UserError
from megatron_rw.preflight.command import PreflightConfig
from tests.program import Run, run_program

BATCH = "--micro-batch-size 2 --train-iters 4 --save-interval 4".split()


def preflight(
    directory: Path,
    data_flags: list[str],
    *flags: str,
    faults: dict[str, dict[str, Any]] | None = None,
    processes: int = 2,
) -> Run:
    save = str(directory / "checkpoints")
    return run_program(
        directory,
        *(*data_flags, *BATCH, "--save", save, "--load", save),
        *("--json", str(directory / "report.json"), *flags),
        processes=processes,
        module="tests.preflight.injected",
        metrics=False,
        patience=30,
        environment={"PREFLIGHT_FAULTS": json.dumps(faults or {})},
    )


def report(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.directory / "report.json").read_text())
    assert found["status"] == run.status[0]
    return found


def findings(run: Run, level: str) -> list[str]:
    return [f["text"] for f in report(run)["findings"] if f["level"] == level]


def test_nothing_wrong(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags).check()
    assert run.output[1].count("\n") == run.output[1].count("INFO:"), "only rank 0 speaks"
    lines = run.output[0].splitlines()
    assert "preflight: 2 ranks, 1 host" in lines
    assert "  driver               none" in lines
    assert findings(run, "problem") == findings(run, "warning") == []
    assert [line for line in lines if line.startswith("ok: ")] == [
        f"ok: {text}" for text in findings(run, "ok")
    ]
    found = report(run)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert all(rank["free_disk"] > 0 for rank in found["ranks"])
    # The job creates its folders, the preflight leaves nothing behind.
    assert not (tmp_path / "checkpoints").exists()
    assert not list(tmp_path.glob(".preflight*"))


def test_each_check_names_the_rank(tmp_path: Path, data_flags: list[str]) -> None:
    faults = {"host": "node1", "torch": "2.10.0", "save": "File too large", "scale": 2}
    run = preflight(
        tmp_path, data_flags, faults={name: {"1": value} for name, value in faults.items()}
    )
    assert run.status == [1, 1], run.all_output
    version, wrong_sum, disk = findings(run, "problem")
    assert re.match(r"torch differs: .* on 1 rank, 2.10.0 on rank 1 \(node1\)", version)
    assert wrong_sum == (
        "ranks 0-1 (node0, node1): an all-reduce of ones over 2 ranks gave 3 to 3 instead of 2."
    )
    save = tmp_path / "checkpoints"
    assert disk == f"rank 1 (node1): cannot write to --save {save}: File too large."


def test_rank_that_never_comes(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(
        tmp_path, data_flags, "--wait-seconds", "2", processes=3, faults={"absent": {"1": True}}
    )
    assert run.status == [1, 0, 1], run.all_output
    assert not run.hung
    assert "problem: rank 1 did not arrive within 2 s (--wait-seconds)" in run.output[0]


def test_rank_0_never_comes(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, "--wait-seconds", "2", faults={"absent": {"0": True}})
    assert run.status == [0, 74], run.all_output
    assert "the 2 processes have not all met at 127.0.0.1:" in run.output[1]
    assert "(--wait-seconds)" in run.output[1]


@pytest.mark.parametrize(("fault", "status"), [("stuck", 74), ("dead", 9)])
def test_rank_that_leaves_a_collective(
    fault: str, status: int, tmp_path: Path, data_flags: list[str]
) -> None:
    run = preflight(tmp_path, data_flags, "--wait-seconds", "5", faults={fault: {"1": True}})
    assert run.status == [74, status], run.all_output
    assert not run.hung
    assert "error: rank 0 on node0: rank 1 did not finish the collectives" in run.output[0]


@pytest.mark.parametrize(("ranks", "named"), [("1", "rank 1"), ("01", "ranks 0-1")])
def test_flags_that_ranks_refuse(
    ranks: str, named: str, tmp_path: Path, data_flags: list[str]
) -> None:
    refusal = dict.fromkeys(ranks, "no such file.")
    run = preflight(tmp_path, data_flags, faults={"refusal": refusal})
    assert run.status == [2, 2], run.all_output
    assert findings(run, "problem") == [f"{named} (node0): no such file."]


def test_kernels_that_cannot_be_compiled(tmp_path: Path, data_flags: list[str]) -> None:
    flags = "--reweight-strategy linupper --reweight-kernels cuda".split()
    run = preflight(tmp_path, data_flags, *flags, processes=1)
    assert run.status == [2], run.all_output
    [problem] = findings(run, "problem")
    assert problem.startswith("rank 0 (node0): the CUDA kernels need a GPU")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"wait_seconds": 0}, "--wait-seconds 0: give a number above 0"),
        ({"json": Path("/nowhere/x.json")}, "--json /nowhere/x.json: there is no such folder."),
    ],
)
def test_own_flags_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        PreflightConfig(**wrong)
