"""Results are right for what the ranks have found out, and say what to change."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.preflight import report
from megatron_rw.preflight.facts import GIB, Facts, driver_version, try_to_save

SETUP = {"device": "H100", "driver": "580.1", "torch": "2.11.0"}


def facts(rank: int, **changes: Any) -> Facts:
    one = Facts(rank, f"node{rank // 2}", None, SETUP, 79 * GIB, 78 * GIB, 500 * GIB, None)
    return dataclasses.replace(one, **changes)


def test_setups_that_differ_name_the_minority() -> None:
    ranks = [
        facts(r, setup=SETUP | {"driver": "570.9"} if r in (2, 3) else SETUP) for r in range(8)
    ]
    [found] = report.check_setup(ranks)
    assert found.level == "problem"
    assert found.text.startswith("driver differs: 580.1 on 6 ranks, 570.9 on ranks 2-3 (node1).")
    [found] = report.check_setup([facts(0), facts(1)])
    assert found == report.CheckResult("ok", "devices and versions are the same on all 2 ranks.")


def test_absent_and_refusing_ranks() -> None:
    ranks = [facts(0), facts(1, refusal="no.")]
    absent, refusing = report.check_presence([8, 9, 10, 12], ranks, 30)
    assert absent.text.startswith("ranks 8-10, 12 did not arrive within 30 s")
    assert refusing == report.CheckResult("problem", "rank 1 (node0): no.")
    assert list(report.check_presence([], [facts(0)], 30)) == []


SPEEDS = ["GEMM: 18", "OUTLIER rank 0 (node0): 27 (+50%)", "OUTLIER rank 1 (node0): 9 (-50%)"]


def test_collectives() -> None:
    ranks = [facts(0), facts(1)]
    [found] = report.check_collectives(ranks, {0: None, 1: "connection refused"}, [])
    assert found == report.CheckResult("problem", "rank 1 (node0): connection refused.")
    [found] = report.check_collectives(ranks, {0: None, 1: None}, SPEEDS)
    assert found.level == "warning"
    assert "below the median: OUTLIER rank 1 (node0): 9 (-50%). All" in found.text


def test_lines_of_the_sniff_test(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import gpu_sniff_test

    from megatron_rw.preflight.collectives import sniff_test

    def measure(tag: str, pg_collection: Any) -> None:
        gpu_sniff_test.logger.info("=" * 60)
        gpu_sniff_test.logger.info("  All-reduce busbw: median=3.00")
        gpu_sniff_test.logger.warning("    OUTLIER rank 1 (node0): 1.00 (-66.7%)")
        gpu_sniff_test.logger.warning("  Result: OUTLIERS DETECTED")

    monkeypatch.setattr(gpu_sniff_test, "run_gpu_sniff_test", measure)
    assert sniff_test() == [
        "All-reduce busbw: median=3.00",
        "OUTLIER rank 1 (node0): 1.00 (-66.7%)",
        "Result: OUTLIERS DETECTED",
    ]
    assert not gpu_sniff_test.logger.handlers


def test_writing_to_the_folder_of_checkpoints() -> None:
    ranks = [facts(0), facts(1)]
    said = [("ok", "--save /s: all ranks can write there.")]
    assert [(one.level, one.text) for one in report.check_saving(ranks, "/s")] == said
    [found] = report.check_saving([facts(0, free_disk=None)], "s3://bucket/x")
    assert found.text == "--save s3://bucket/x: writing to object storage was not tried."
    [found] = report.check_saving(ranks, None)
    assert found.level == "warning", "a job that does not save"


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_can_be_read_back(ranks: set[int]) -> None:
    runs = report.ranks_text(list(ranks)).split(" ", 1)[1].split(", ")
    pairs = [run.split("-") for run in runs]
    assert {r for pair in pairs for r in range(int(pair[0]), int(pair[-1]) + 1)} == ranks


def test_table_prints_what_is_the_same_once_and_few_of_many_hosts() -> None:
    ranks = [facts(r, setup=SETUP | {"torch": "2.10"} if r == 9 else SETUP) for r in range(100)]
    lines = list(report.table(ranks, ["GEMM 3"]))
    assert lines[0] == "preflight: 100 ranks, 50 hosts"
    assert "  driver               580.1" in lines
    assert "  torch                2.11.0 on ranks 0-8, 10-99; 2.10 on rank 9" in lines
    [row] = [line for line in lines if "node1 " in line]
    assert row.split() == "node1 500.0 GiB 78.0 GiB ranks 2-3".split()
    assert sum("node" in line for line in lines) == report.MAX_HOSTS
    assert lines[-2] == f"  and {50 - report.MAX_HOSTS} more hosts: --json FILE has all"


def test_driver(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) == "none"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n"
    )
    assert driver_version(file) == "580.82.07"


def test_trying_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, problem = try_to_save(str(tmp_path / "not" / "there"))
    assert problem is None
    assert free is not None
    assert list(tmp_path.iterdir()) == []
    assert try_to_save("s3://bucket/x") == try_to_save(None) == (None, None)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert try_to_save(str(tmp_path)) == (None, f"No space left on device: {tmp_path}")
