"""Verdicts are right for what the ranks have found out, and say what to change."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.preflight import findings, table
from megatron_rw.preflight.estimate import Estimate
from megatron_rw.preflight.facts import GIB, Facts, driver_version, try_to_save
from megatron_rw.preflight.measure import (
    Clock,
    Rates,
    by_host,
    hosts_of,
    median_clock,
    neighbours,
    within_hosts,
)

VERSIONS = {"driver": "580.1", "torch": "2.11.0"}
NEEDED = Estimate(64, 7e9, 40 * GIB, 20 * GIB, 90 * GIB, 10, 10, 1e18, 16, ())


def facts(rank: int, **changes: object) -> Facts:
    one = Facts(
        rank, f"node{rank // 2}", None, "H100", VERSIONS, 79 * GIB, 78 * GIB, 500 * GIB, None
    )
    return dataclasses.replace(one, **changes)  # type: ignore[arg-type]


def texts(found: list[findings.Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.text) for finding in found]


def test_versions_that_differ_name_the_minority() -> None:
    ranks = [
        facts(r, versions=VERSIONS | {"driver": "570.9"} if r in (2, 3) else VERSIONS)
        for r in range(8)
    ]
    [(level, text)] = texts(findings.versions(ranks))
    assert level == "problem"
    assert text.startswith("driver differs: 580.1 on 6 ranks, 570.9 on ranks 2-3 (node1).")


def test_devices_that_differ() -> None:
    [(level, text)] = texts(findings.versions([facts(0), facts(1), facts(2, device="A100")]))
    assert (level, text[:42]) == ("problem", "device differs: H100 on 2 ranks, A100 on r")


def test_same_versions() -> None:
    [(level, text)] = texts(findings.versions([facts(0), facts(1)]))
    assert (level, text) == ("ok", "devices and versions are the same on all 2 ranks.")


def test_absent_and_refusing_ranks() -> None:
    found = texts(findings.absences([8, 9, 10, 12], [facts(0), facts(1, refusal="no.")], 30))
    assert [level for level, _ in found] == ["problem", "problem"]
    assert found[0][1].startswith("ranks 8-10, 12 did not arrive within 30 s")
    assert found[1][1] == "rank 1 (node0): no."
    assert findings.absences([], [facts(0)], 30) == []


@pytest.mark.parametrize(
    ("free", "level"),
    [(500, "ok"), (180, "ok"), (179, "warning"), (90, "warning"), (89, "problem")],
)
def test_room_for_checkpoints(free: int, level: str) -> None:
    ranks = [facts(0), facts(1, free_disk=free * GIB)]
    [finding] = findings.saving(ranks, "/s", 90 * GIB, 2)
    assert finding.level == level
    assert ("there should be room for 2" in finding.text) == (level != "ok")


def test_job_that_cannot_or_does_not_save() -> None:
    ranks = [facts(0), facts(1, save_problem="Read-only file system: /s")]
    [finding] = findings.saving(ranks, "/s/x", None, 2)
    assert finding.text == "rank 1 (node0) cannot write to --save /s/x: Read-only file system: /s."
    [finding] = findings.saving(ranks, None, None, 2)
    assert finding.level == "warning"


@pytest.mark.parametrize(
    ("total", "free", "level", "words"),
    [
        (79, 78, "ok", "about 60.0 GiB by Megatron's formulas, of 79.0 GiB"),
        (66, 65, "warning", "which is close"),
        (59, 58, "problem", "on node0. Lower it with LESS."),
        (79, 59, "problem", "only 59.0 GiB are free on rank 1 (node0): end the processes"),
    ],
)
def test_memory(total: int, free: int, level: str, words: str) -> None:
    ranks = [facts(0), facts(1, device_memory=total * GIB, free_memory=free * GIB)]
    [finding] = findings.memory(ranks, NEEDED, "LESS")
    assert finding.level == level
    assert words in finding.text


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e6, 1e12), min_size=2))
def test_slow_hosts_are_those_below_half_the_median(rates: dict[str, float]) -> None:
    [finding] = findings.slow_hosts("between hosts", rates)
    slow = {host for host, rate in rates.items() if rate < statistics.median(rates.values()) / 2}
    assert (finding.level == "problem") == bool(slow)
    named = {host for host in rates if f" {host} " in finding.text.split(", where")[0]}
    assert named == slow or not slow


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_can_be_read_back(ranks: set[int]) -> None:
    runs = findings.ranks_text(list(ranks)).split(" ", 1)[1].split(", ")
    pairs = [run.split("-") for run in runs]
    assert {r for pair in pairs for r in range(int(pair[0]), int(pair[-1]) + 1)} == ranks


@given(
    st.floats(-1e4, 1e4),
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=9),
)
def test_clock_is_known_to_half_the_longest_round_trip(
    ahead: float, delays: list[tuple[float, float]]
) -> None:
    rounds = [(100.0, 100.0 + out + ahead, 100.0 + out + back) for out, back in delays]
    clock = median_clock(rounds)
    assert abs(clock.ahead - ahead) <= max(out + back for out, back in delays) / 2 + 1e-6


def test_clock_with_one_disturbed_round() -> None:
    clock = median_clock([(0, 5.01, 0.02), (1, 6.01, 1.02), (2, 7.9, 3.0)])
    assert clock.ahead == pytest.approx(5.0)
    assert clock.round_trip == pytest.approx(0.02)


@given(st.integers(1, 40))
def test_every_host_meets_two_others_and_one_at_a_time(number: int) -> None:
    hosts = [f"h{i}" for i in range(number)]
    rounds = neighbours(hosts)
    for pairs in rounds:
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy))
    met = [host for pairs in rounds for pair in pairs for host in pair]
    assert sorted(met) == (sorted(2 * hosts) if number > 2 else [])
    assert len(rounds) <= 3


def test_only_the_slow_host_is_slow_with_all_its_neighbours() -> None:
    hosts = hosts_of({rank: f"node{rank // 2}" for rank in range(8)})
    assert hosts["node3"] == [6, 7]
    # node1 is slow: so are its pairs with node0 and node2.
    pairs = {0: [1.0, 9.0], 2: [1.0, 1.0], 4: [1.0, 9.0], 6: [9.0, 9.0]}
    rates = {r: Rates({}, {}, 3.0 + r, pairs.get(r, [])) for r in range(8)}
    assert by_host(hosts, rates) == {"node0": 9.0, "node1": 1.0, "node2": 9.0, "node3": 9.0}
    assert within_hosts(hosts, rates) == {"node0": 3.0, "node1": 5.0, "node2": 7.0, "node3": 9.0}


def test_clocks_that_are_off_are_named() -> None:
    found = findings.clocks({"a": Clock(0.9, 0.1), "b": Clock(-1.5, 0.1)})
    assert texts(found)[0][0] == "warning"
    assert "b by -1.5 s." in found[0].text
    assert " a " not in found[0].text


def test_table_prints_what_is_the_same_once_and_few_of_many_hosts() -> None:
    ranks = [
        facts(r, versions=VERSIONS | {"torch": "2.10"} if r == 9 else VERSIONS) for r in range(100)
    ]
    lines = list(table.lines(ranks, hosts_of({f.rank: f.host for f in ranks}), {}, {}))
    assert lines[0] == "preflight: 100 ranks, 50 hosts"
    assert "  driver               580.1" in lines
    assert "  torch                2.11.0 on ranks 0-8, 10-99; 2.10 on rank 9" in lines
    assert lines[-1] == f"  and {50 - table.MOST_HOSTS} more hosts: --json FILE has all"
    assert sum("node" in line for line in lines) == table.MOST_HOSTS


def test_driver(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) == "none"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n"
    )
    assert driver_version(file) == "580.82.07"


def test_trying_to_save(tmp_path: Path) -> None:
    free, problem = try_to_save(str(tmp_path / "not" / "there"))
    assert problem is None
    assert free is not None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    free, problem = try_to_save(str(tmp_path / "file" / "below"))
    assert (free, problem) == (None, f"Not a directory: {tmp_path / 'file'}")
    assert try_to_save("s3://bucket/x") == try_to_save(None) == (None, None)
