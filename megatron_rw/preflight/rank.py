"""What every rank does, and what rank 0 does besides: ask, judge, print."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from megatron_rw.platform import Device
from megatron_rw.platform.files import write_complete
from megatron_rw.preflight import findings, table
from megatron_rw.preflight.config import PreflightConfig
from megatron_rw.preflight.estimate import Estimate, advice, estimate
from megatron_rw.preflight.facts import Facts, gather
from megatron_rw.preflight.findings import Finding
from megatron_rw.preflight.measure import (
    Clock,
    Rates,
    all_reduces,
    answer_clock,
    ask_clock,
    by_host,
    hosts_of,
    within_hosts,
)
from megatron_rw.preflight.meeting import Meeting, NoAnswerError, open_store
from megatron_rw.resilience import watchdog

PROBLEMS, REFUSED = 1, 2


def look(
    config: PreflightConfig, device: Device, args: Namespace | None, refusal: str | None
) -> int:
    """The preflight, on every rank.

    Args:
        config: the preflight's own flags.
        device: what `platform.select_device` chose.
        args: the job's, None where it would not start.
        refusal: why not.

    Returns:
        The exit status, the same on all ranks that see the end.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    facts = gather(rank, device, None if args is None else args.save, refusal)
    try:
        rendezvous = watchdog.Rendezvous(config.wait_seconds / 60, "--wait-seconds")
        rendezvous.begin()
        store = open_store(config.wait_seconds)
        rendezvous.end()
        meeting = Meeting(store, rank, size, config.wait_seconds)
        meeting.tell("facts", dataclasses.asdict(facts))
        if rank == 0:
            return _Lead(config, meeting, device, args).run()
        return _follow(meeting, device, args)
    except (NoAnswerError, RuntimeError) as error:
        where = f"rank {rank} on {socket.gethostname()}"
        print(f"error: {where}: {error}", file=sys.stderr, flush=True)
        return PROBLEMS if not isinstance(error, NoAnswerError) else watchdog.EXIT_STATUS


def _follow(meeting: Meeting, device: Device, args: Namespace | None) -> int:
    """What ranks other than 0 do."""
    # Rank 0 may have come late, and waits for others from then on.
    plan = meeting.hear("plan", 0, wait_s=2 * meeting.wait_s)
    if plan["hosts"] is not None and args is not None:
        with _Watched(meeting) as progress:
            if meeting.rank in [ranks[0] for ranks in plan["hosts"].values()]:
                answer_clock(meeting)
            meeting.hear("clocks", 0)
            rates = _measure(meeting, plan["hosts"], device, args, progress)
            meeting.tell("rates", dataclasses.asdict(rates))
    status = int(meeting.hear("status", 0))
    meeting.leave(0)
    return status


class _Lead:
    """Rank 0."""

    def __init__(
        self, config: PreflightConfig, meeting: Meeting, device: Device, args: Namespace | None
    ) -> None:
        self._config, self._meeting, self._device, self._args = config, meeting, device, args

    def run(self) -> int:
        told, missing = self._meeting.hear_all("facts")
        facts = [Facts(**told[rank]) for rank in sorted(told)]
        found = findings.absences(missing, facts, self._meeting.wait_s)
        report: dict[str, Any] = {"ranks": [dataclasses.asdict(f) for f in facts]}
        if found or self._args is None:
            self._meeting.tell("plan", {"hosts": None})
            refused = any(f.refusal is not None for f in facts)
            return self._end(found, report, len(facts), REFUSED if refused else PROBLEMS)

        hosts = hosts_of({f.rank: f.host for f in facts})
        self._meeting.tell("plan", {"hosts": hosts})
        clock, rates = self._ask(hosts, self._args)
        needed = estimate(self._args)
        for line in table.lines(facts, hosts, clock, rates):
            print(line)
        hours = self._hours(needed, facts)
        for line in needed.lines(hours) if needed is not None else ():
            print(line)
        print()
        found = self._judge(facts, hosts, clock, rates, needed)
        report |= {
            "clocks": {host: dataclasses.asdict(c) for host, c in clock.items()},
            "rates": {rank: dataclasses.asdict(r) for rank, r in rates.items()},
            "estimate": None if needed is None else dataclasses.asdict(needed),
        }
        problems = any(finding.level == "problem" for finding in found)
        return self._end(found, report, len(facts), PROBLEMS if problems else 0)

    def _ask(
        self, hosts: Mapping[str, list[int]], args: Namespace
    ) -> tuple[dict[str, Clock], dict[int, Rates]]:
        if self._meeting.size == 1:
            return {}, {}
        clock = {}
        with _Watched(self._meeting) as progress:
            for host, ranks in list(hosts.items())[1:]:
                clock[host] = ask_clock(self._meeting, ranks[0])
            self._meeting.tell("clocks", True)
            own = _measure(self._meeting, hosts, self._device, args, progress)
            self._meeting.tell("rates", dataclasses.asdict(own))
            told, missing = self._meeting.hear_all("rates")
        if missing:
            raise NoAnswerError(f"{findings.ranks_text(missing)} did not finish the all-reduces")
        return clock, {rank: Rates.of_json(rates) for rank, rates in told.items()}

    def _judge(
        self,
        facts: Sequence[Facts],
        hosts: Mapping[str, list[int]],
        clock: Mapping[str, Clock],
        rates: Mapping[int, Rates],
        needed: Estimate | None,
    ) -> list[Finding]:
        args = self._args
        assert args is not None
        wanted = self._config.room_for_checkpoints or (args.keep_last or 1) + 1
        size = None if needed is None else needed.checkpoint_bytes
        return [
            *findings.versions(facts),
            *findings.clocks(clock),
            *findings.saving(facts, args.save, size, wanted),
            *findings.slow_hosts("within hosts", within_hosts(hosts, rates)),
            *findings.slow_hosts("between hosts", by_host(hosts, rates)),
            *findings.memory(facts, needed, advice(args)),
        ]

    def _hours(self, needed: Estimate | None, facts: Sequence[Facts]) -> str | None:
        """Of training; not where the peak of the device is unknown."""
        peak = self._config.peak_tflops
        if needed is None or (peak is None and "H100" not in facts[0].device):
            return None
        return needed.hours_text(peak, self._config.assumed_mfu)

    def _end(
        self, found: Sequence[Finding], report: dict[str, Any], present: int, status: int
    ) -> int:
        for finding in found:
            print(f"{finding.level}: {finding.text}", flush=True)
        if self._config.json is not None:
            verdicts = [dataclasses.asdict(finding) for finding in found]
            write_json(self._config.json, {"status": status, "findings": verdicts} | report)
        self._meeting.tell("status", status)
        self._meeting.leave(present - 1)
        return status


class _Watched:
    """Ends the process with the name of whoever keeps the others waiting.

    Args:
        meeting: whose store tells ranks of each other.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._progress = watchdog.Progress()
        self._progress.then("preflight, comparing clocks")
        connection = meeting.store.clone()
        connection.set_timeout(timedelta(seconds=2 * watchdog.BEAT_SECONDS))
        self._dog = watchdog.Watchdog(
            connection, meeting.rank, meeting.size, self._progress, meeting.wait_s
        )

    def __enter__(self) -> watchdog.Progress:
        self._dog.start()
        return self._progress

    def __exit__(self, *exception: object) -> None:
        self._dog.stop()


def _measure(
    meeting: Meeting,
    hosts: Mapping[str, list[int]],
    device: Device,
    args: Namespace,
    progress: watchdog.Progress,
) -> Rates:
    progress.then("preflight, forming a group of all ranks")
    timeout = timedelta(seconds=meeting.wait_s)
    dist.init_process_group(
        args.distributed_backend,
        store=PrefixStore("megatron_rw/preflight/group", meeting.store),
        rank=meeting.rank,
        world_size=meeting.size,
        timeout=timeout,
    )
    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else device
    try:
        rates = all_reduces(meeting.rank, hosts, torch.device(where), progress, timeout)
    except RuntimeError as error:
        raise RuntimeError(f"{progress.position.doing}: {error}") from error
    progress.then("preflight, done")
    dist.destroy_process_group()
    return rates


def write_json(path: str, value: dict[str, Any]) -> None:
    """Write a report, whole or not at all."""
    write_complete(Path(path), json.dumps(value, indent=2) + "\n")
