"""The preflight in real processes over gloo: what is wrong on one rank is found, and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.errors import UserError
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
    run = preflight(
        tmp_path,
        data_flags,
        faults={
            "host": {"1": "node1"},
            "clock": {"1": 3.0},
            "torch": {"1": "2.10.0"},
            "file_size": {"1": 100},
            "scale": {"1": 2},
        },
    )
    assert run.status == [1, 1], run.all_output
    assert report(run)["clocks"]["node1"]["ahead"] == pytest.approx(3.0, abs=0.1)
    [clock] = findings(run, "warning")
    assert "clocks differ from rank 0's: node1 by +3.0 s." in clock
    version, wrong_sum, disk = findings(run, "problem")
    assert re.match(r"torch differs: .* on 1 rank, 2.10.0 on rank 1 \(node1\)", version)
    assert wrong_sum == (
        "ranks 0-1 (node0, node1): an all-reduce of ones over 2 ranks gave 3 to 3 instead of 2."
    )
    save = tmp_path / "checkpoints"
    assert disk == f"rank 1 (node1) cannot write to --save {save}: File too large: {tmp_path}."


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
    run = preflight(tmp_path, data_flags, "--wait-seconds", "8", faults={fault: {"1": True}})
    assert run.status == [74, status], run.all_output
    assert not run.hung
    assert "error: rank 0 on node0: rank 1 did not finish the collectives" in run.output[0]


def test_flags_that_one_rank_refuses(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(
        tmp_path, data_flags, faults={"host": {"1": "node1"}, "refusal": {"1": "no such file."}}
    )
    assert run.status == [2, 2], run.all_output
    assert findings(run, "problem") == ["rank 1 (node1): no such file."]


def test_flags_that_all_ranks_refuse(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, "--micro-batch-size", "0")
    assert run.status == [2, 2], run.all_output
    [problem] = findings(run, "problem")
    assert problem.startswith("ranks 0-1 (node0): ")


def test_own_flags_that_cannot_be(tmp_path: Path, data_flags: list[str]) -> None:
    from megatron_rw.preflight.config import PreflightConfig

    for wrong, message in (
        ({"wait_seconds": 0}, "--wait-seconds must be above 0, not 0."),
        ({"assumed_mfu": 1.5}, "--assumed-mfu must be at most 1, not 1.5."),
        ({"json": Path("/nowhere/x.json")}, "--json /nowhere/x.json: there is no such folder."),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            PreflightConfig(**wrong)
    run = preflight(tmp_path, data_flags, "--wait-seconds", "long", processes=1)
    assert run.status == [2]
    assert "error: --wait-seconds long: give a whole number" in run.output[0]
