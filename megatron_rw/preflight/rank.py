"""The checks of a preflight in their order: on every rank, and on rank 0, which judges."""

import dataclasses
import os
import socket
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import DistError

from megatron_rw.errors import USER_ERROR_STATUS, UserError, print_error
from megatron_rw.platform import Device
from megatron_rw.platform.files import write_json
from megatron_rw.preflight import report
from megatron_rw.preflight.collectives import try_collectives
from megatron_rw.preflight.command import PreflightConfig
from megatron_rw.preflight.facts import Facts, look_around
from megatron_rw.preflight.messages import NoAnswerError, RankMessages, open_store
from megatron_rw.preflight.report import CheckResult, ranks_text
from megatron_rw.resilience import watchdog
from megatron_rw.training.arguments import megatron_config, parse_job_flags
from megatron_rw.training.callbacks.kernels import compile_here
from megatron_rw.training.datasets import Domains

PROBLEMS = 1
_LAST_WAIT_S = 10.0


def look(settings: PreflightConfig, flags: Sequence[str], device: Device) -> int:
    """Makes all checks of a job with these flags, on every rank.

    Returns the exit status, the same on all ranks that see the end.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    args: Namespace | None = None
    refusal: str | None = None
    try:
        args = check_job(flags, device)
    except (UserError, OSError) as error:
        # The ranks meet nevertheless, so that the table names a rank that alone refuses.
        refusal = str(error)
    facts = look_around(rank, device, None if args is None else args.save, refusal)
    try:
        with watchdog.Rendezvous(settings.wait_seconds / 60, "--wait-seconds"):
            store = open_store(settings.wait_seconds)
        messages = RankMessages(store, rank, size, settings.wait_seconds)
        messages.send("facts", dataclasses.asdict(facts))
        if rank == 0:
            return _lead(settings, messages, args, device)
        return _follow(messages, args, device)
    except (NoAnswerError, DistError) as error:
        print_error(f"rank {rank} on {socket.gethostname()}: {error}")
        return watchdog.EXIT_STATUS if isinstance(error, NoAnswerError) else PROBLEMS


def check_job(flags: Sequence[str], device: Device) -> Namespace:
    """Returns the job's arguments, after all checks that it makes itself before it starts."""
    settings = parse_job_flags(flags, device)
    args = settings.megatron
    megatron_config(args)
    Domains(args)
    compile_here(settings)
    return args


def _follow(messages: RankMessages, args: Namespace | None, device: Device) -> int:
    """Takes part in what rank 0 leads, and returns its exit status."""
    if messages.receive("all ranks are ready") and args is not None:
        problem, _ = try_collectives(messages, args.distributed_backend, device)
        messages.send("collectives", problem)
    status = int(messages.receive("status"))
    messages.send("status was read", True)
    return status


def _lead(
    settings: PreflightConfig, messages: RankMessages, args: Namespace | None, device: Device
) -> int:
    """Asks the other ranks, judges, prints, and returns the exit status. On rank 0."""
    told, missing = messages.receive_all("facts", range(messages.size), messages.wait_s)
    facts = [Facts(**told[rank]) for rank in sorted(told)]
    record: dict[str, Any] = {"ranks": [dataclasses.asdict(one) for one in facts]}
    results = list(report.check_presence(missing, facts, messages.wait_s))
    messages.send("all ranks are ready", not results)
    if args is not None and not results:
        problem, speeds = try_collectives(messages, args.distributed_backend, device)
        messages.send("collectives", problem)
        problems, missing = messages.receive_all("collectives", told, messages.wait_s)
        if missing:
            raise NoAnswerError(f"{ranks_text(missing)} did not finish the collectives")
        print(*report.table(facts, speeds), "", sep="\n")
        results = [
            *report.check_setup(facts),
            *report.check_collectives(facts, problems, speeds),
            *report.check_saving(facts, args.save),
        ]
        record["sniff_test"] = speeds
    status = _print_results(settings, results, record)
    messages.send("status", status)
    # The store may live in this process, so the others have to read it before this one ends.
    messages.receive_all("status was read", told.keys() - {0}, _LAST_WAIT_S)
    return status


def _print_results(
    settings: PreflightConfig, results: Sequence[CheckResult], record: dict[str, Any]
) -> int:
    """Prints the results, writes the report, and returns the exit status."""
    refused = any(one["refusal"] is not None for one in record["ranks"])
    failed = any(result.level == "problem" for result in results)
    status = USER_ERROR_STATUS if refused else PROBLEMS if failed else 0
    for result in results:
        print(f"{result.level}: {result.text}", flush=True)
    if settings.json is not None:
        findings = [dataclasses.asdict(result) for result in results]
        write_json(settings.json, {"status": status, "findings": findings} | record)
    return status
