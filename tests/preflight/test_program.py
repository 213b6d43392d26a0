"""The preflight in real processes over gloo: what is wrong on one rank is found, and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.program import Run, run_program

BATCH = "--micro-batch-size 2 --train-iters 4 --save-interval 4".split()


def preflight(
    directory: Path, data_flags: list[str], *flags: str, processes: int = 2, **faults: Any
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
        environment={"PREFLIGHT_FAULTS": json.dumps(faults)},
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
    assert all(rate > 0 for rank in found["rates"].values() for rate in rank["world"].values())
    # The job creates its folders, the preflight leaves nothing behind.
    assert not (tmp_path / "checkpoints").exists()
    assert not list(tmp_path.glob(".preflight*"))


def test_other_clock_version_and_host(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(
        tmp_path, data_flags, host={"1": "node1"}, clock={"1": 3.0}, torch={"1": "2.10.0"}
    )
    assert run.status == [1, 1], run.all_output
    assert report(run)["clocks"]["node1"]["ahead"] == pytest.approx(3.0, abs=0.1)
    [warning] = findings(run, "warning")
    assert "clocks differ from rank 0's: node1 by +3.0 s." in warning
    [problem] = findings(run, "problem")
    assert problem.startswith("torch differs: 2.11.0")
    assert "on 1 ranks, 2.10.0 on rank 1 (node1)." in problem
    assert "over one rank of each host:" in run.output[0]


def test_slow_host_of_four(tmp_path: Path, data_flags: list[str]) -> None:
    hosts = {str(rank): f"node{rank}" for rank in range(4)}
    run = preflight(tmp_path, data_flags, processes=4, host=hosts, slow={"2": 0.3})
    assert run.status == [1] * 4, run.all_output
    [problem] = findings(run, "problem")
    assert problem.startswith("bandwidth between hosts: node2 0.0")
    assert "node1" not in problem


def test_disk_that_one_rank_cannot_write_to(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, file_size={"1": 100})
    assert run.status == [1, 1], run.all_output
    save = tmp_path / "checkpoints"
    assert findings(run, "problem") == [
        f"rank 1 (node0) cannot write to --save {save}: File too large: {tmp_path}."
    ]


def test_rank_that_never_comes(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, "--wait-seconds", "2", processes=3, absent={"1": True})
    assert run.status == [1, 0, 1], run.all_output
    assert not run.hung
    assert "problem: rank 1 did not arrive within 2 s (--wait-seconds)" in run.output[0]


def test_rank_0_never_comes(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, "--wait-seconds", "2", absent={"0": True})
    assert run.status == [0, 74], run.all_output
    assert "the 2 processes have not all met at 127.0.0.1:" in run.output[1]
    assert "(--wait-seconds)" in run.output[1]


def test_rank_that_is_stuck_while_measuring(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, "--wait-seconds", "6", stuck={"1": True})
    assert run.status[0] == 1, run.all_output
    assert "error: rank 0 on node0: preflight, all-reduce over all ranks: " in run.output[0]
    # Rank 1 is asleep; its watchdog is not.
    assert run.status[1] == 74, run.all_output
    assert not run.hung


def test_rank_that_dies_while_measuring(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, "--wait-seconds", "6", dead={"1": True})
    assert run.status == [1, 9], run.all_output
    assert "error: rank 0 on node0: preflight, all-reduce over all ranks: " in run.output[0]
    assert not run.hung


def test_sum_that_is_wrong(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, "--wait-seconds", "6", scale={"1": 2})
    assert run.status == [1, 1], run.all_output
    assert "an all-reduce of ones over 2 ranks gave 3 to 3 instead of 2" in run.output[0]


def test_flags_that_the_job_refuses(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(
        tmp_path, data_flags, "--reweight-strategy", "linupper", "--micro-batch-size", "0"
    )
    assert run.status == [2, 2], run.all_output
    assert len([line for line in run.output[0].splitlines() if line.startswith("problem: ")]) == 1


def test_flags_that_one_rank_refuses(tmp_path: Path, data_flags: list[str]) -> None:
    run = preflight(tmp_path, data_flags, host={"1": "node1"}, refusal={"1": "no such file."})
    assert run.status == [2, 2], run.all_output
    assert findings(run, "problem") == ["rank 1 (node1): no such file."]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--wait-seconds", "0"], "--wait-seconds must be above 0, not 0."),
        (["--assumed-mfu", "1.5"], "--assumed-mfu must be above 0 and at most 1, not 1.5."),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no such folder."),
        (["--wait-seconds", "long"], "argument --wait-seconds: invalid int value: 'long'"),
    ],
)
def test_own_flags_that_cannot_be(
    flags: list[str], message: str, tmp_path: Path, data_flags: list[str]
) -> None:
    run = preflight(tmp_path, data_flags, *flags, processes=1)
    assert run.status == [2]
    assert [line for line in run.output[0].splitlines() if "error:" in line] == [
        f"error: {message}"
    ]
