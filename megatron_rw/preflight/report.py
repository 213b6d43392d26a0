"""What the ranks have found out: judged, and printed by rank 0 as one table.

Everything here is a function of what the ranks sent: `facts` are those of all ranks in their order,
`clocks` those of all hosts but rank 0's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rw.preflight.facts import Facts, amount
from megatron_rw.preflight.messages import Clock

if TYPE_CHECKING:
    # Imports Megatron, which has to wait until the device is chosen.
    from megatron_rw.preflight.estimate import Estimate

Level = Literal["ok", "warning", "problem"]
# Seconds between clocks from which logs and file times of two hosts can no longer be ordered.
MAX_SKEW_S = 1.0
# Share of a GPU's memory above which an estimate is called close.
CLOSE = 0.9
# Hosts in the table; --json has all.
MAX_HOSTS = 32
_NOTHING = "-"


@dataclass(frozen=True)
class CheckResult:
    """The result of one check, with a text that names the remedy.

    A job should not be started with a problem.
    """

    level: Level
    text: str


def by_host(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Returns the facts of each host's ranks, in the order of their first ranks."""
    return _grouped(facts, lambda one: one.host)


def check_presence(
    missing: Sequence[int], present: Sequence[Facts], wait_s: float
) -> Iterator[CheckResult]:
    """Names ranks that have not come, and ranks on which the job would not start."""
    if missing:
        yield CheckResult(
            "problem",
            f"{ranks_text(missing)} did not arrive within {wait_s:g} s (--wait-seconds): see that "
            "all processes were started, on nodes that are up, and reach MASTER_ADDR.",
        )
    for why, group in _grouped(present, lambda one: one.refusal).items():
        yield CheckResult("problem", f"{_who(group)}: {why}")


def check_setup(facts: Sequence[Facts]) -> Iterator[CheckResult]:
    """Names software and devices that differ between ranks."""
    differ = False
    for name in facts[0].setup:
        groups = _by_version(facts, name)
        if len(groups) > 1:
            differ = True
            most = max(groups, key=lambda version: len(groups[version]))
            others = "; ".join(f"{v} on {_who(g)}" for v, g in groups.items() if v != most)
            yield CheckResult(
                "problem",
                f"{name} differs: {most} on {_count(len(groups[most]), 'rank')}, {others}. Give "
                "all the same.",
            )
    if not differ:
        everyone = f"all {len(facts)} ranks" if len(facts) > 1 else "the one rank"
        yield CheckResult("ok", f"devices and versions are the same on {everyone}.")


def check_clocks(clocks: Mapping[str, Clock]) -> Iterator[CheckResult]:
    """Names hosts whose clocks are off."""
    off = {h: clock.ahead for h, clock in clocks.items() if abs(clock.ahead) > MAX_SKEW_S}
    if off:
        hosts = ", ".join(f"{host} by {ahead:+.1f} s" for host, ahead in off.items())
        yield CheckResult(
            "warning",
            f"clocks differ from rank 0's: {hosts}. Logs and file times cannot be ordered: see "
            "that NTP runs there.",
        )
    elif clocks:
        yield CheckResult("ok", f"clocks agree with rank 0's to within {MAX_SKEW_S:g} s.")


def check_collectives(
    facts: Sequence[Facts], problems: Mapping[int, str | None], speeds: Sequence[str]
) -> Iterator[CheckResult]:
    """Tells where collectives fail and which GPUs are slow, by the results of `try_collectives`."""
    failed = _grouped(facts, lambda one: problems.get(one.rank))
    slow = [line for line in speeds if line.startswith("OUTLIER ") and "(-" in line]
    for why, group in failed.items():
        yield CheckResult("problem", f"{_who(group)}: {why}.")
    if slow:
        yield CheckResult(
            "warning",
            f"Megatron's GPU sniff test finds ranks far below the median: {'; '.join(slow)}. "
            "All ranks wait for the slowest: look at its links and its GPU.",
        )
    if not failed and not slow:
        yield CheckResult("ok", "all ranks all-reduce together.")


def check_saving(
    facts: Sequence[Facts], save: str | None, checkpoint_bytes: float | None, wanted: int
) -> Iterator[CheckResult]:
    """Tells whether --save can be written to, and has room for `wanted` checkpoints."""
    failed = _grouped(facts, lambda one: one.save_problem)
    free = {one.host: one.free_disk for one in facts if one.free_disk is not None}
    if save is None:
        yield CheckResult("warning", "the job saves nothing: add --save DIR and --save-interval.")
    elif failed:
        for why, group in failed.items():
            yield CheckResult("problem", f"{_who(group)} cannot write to --save {save}: {why}.")
    elif not free or checkpoint_bytes is None:
        yield CheckResult("ok", f"--save {save}: its room was not compared with a checkpoint.")
    else:
        host = min(free, key=lambda host: free[host])
        room = (
            f"--save {save}: {amount(free[host])} are free on {host}, a checkpoint takes about "
            f"{amount(checkpoint_bytes)}"
        )
        if free[host] >= wanted * checkpoint_bytes:
            text = f"{room}; all ranks can write there. A quota does not show in this."
            yield CheckResult("ok", text)
        else:
            yield CheckResult(
                "problem" if free[host] < checkpoint_bytes else "warning",
                f"{room}, and there should be room for {wanted} (--room-for-checkpoints): make "
                "room, keep fewer with --keep-last, or save elsewhere.",
            )


def check_memory(facts: Sequence[Facts], needed: Estimate | None, advice: str) -> CheckResult:
    """Tells whether the job fits the GPUs by Megatron's formulas, and advises what to change."""
    with_memory = [one for one in facts if one.device_memory is not None]
    if needed is None:
        return CheckResult("ok", "memory: Megatron has no formula for a hybrid model.")
    if not with_memory:
        return CheckResult("ok", "memory: there is no GPU to compare the estimate with.")
    smallest = min(with_memory, key=lambda one: one.device_memory or 0)
    has = float(smallest.device_memory or 0)
    text = f"memory: about {amount(needed.memory_bytes)} by Megatron's formulas, of {amount(has)}"
    if needed.memory_bytes > has:
        return CheckResult("problem", f"{text} on {smallest.host}. Lower it with {advice}.")
    taken = [one for one in with_memory if float(one.free_memory or 0) < needed.memory_bytes]
    if taken:
        free = amount(min(one.free_memory or 0 for one in taken))
        return CheckResult(
            "problem",
            f"{text}, but only {free} are free on {_who(taken)}: end the processes that hold the "
            "rest (nvidia-smi).",
        )
    if needed.memory_bytes > CLOSE * has:
        return CheckResult(
            "warning",
            f"{text} on {smallest.host}, which is close: the formulas leave things out. To lower "
            f"it: {advice}.",
        )
    return CheckResult("ok", f"{text}.")


def table(
    facts: Sequence[Facts], clocks: Mapping[str, Clock], speeds: Sequence[str]
) -> Iterator[str]:
    """Yields the lines of the table, which tells once what is the same on all ranks."""
    hosts = by_host(facts)
    yield f"preflight: {_count(len(facts), 'rank')}, {_count(len(hosts), 'host')}"
    for name in facts[0].setup:
        groups = _by_version(facts, name)
        where = {v: f" on {ranks_text([one.rank for one in g])}" for v, g in groups.items()}
        text = "; ".join(v + where[v] for v in groups) if len(groups) > 1 else next(iter(groups))
        yield f"  {name:20} {text}"
    yield ""
    rows: list[tuple[str, ...]] = [("host", "ranks", "clock", "free disk", "free memory")]
    rows += [
        _row(own, clocks.get(host)) for host, own in itertools.islice(hosts.items(), MAX_HOSTS)
    ]
    columns = [c for c in zip(*rows, strict=True) if any(cell != _NOTHING for cell in c[1:])]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  " + "  ".join(cells).rstrip()
    if len(hosts) > MAX_HOSTS:
        yield f"  and {len(hosts) - MAX_HOSTS} more hosts: --json FILE has all"
    for line in speeds:
        yield f"  {line}"


def _row(own: Sequence[Facts], clock: Clock | None) -> tuple[str, ...]:
    disks = [one.free_disk for one in own if one.free_disk is not None]
    memories = [one.free_memory for one in own if one.free_memory is not None]
    return (
        own[0].host,
        ranks_text([one.rank for one in own]).split(" ", 1)[1],
        f"{1000 * clock.ahead:+.1f} ms ± {500 * clock.round_trip:.1f}" if clock else _NOTHING,
        amount(min(disks)) if disks else _NOTHING,
        amount(min(memories)) if memories else _NOTHING,
    )


def ranks_text(ranks: Sequence[int]) -> str:
    """Returns `rank 3`, or `ranks 0, 8-15`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _by_version(facts: Sequence[Facts], name: str) -> dict[str, list[Facts]]:
    return _grouped(facts, lambda one: one.setup.get(name, "unknown"))


def _grouped(
    facts: Sequence[Facts], value: Callable[[Facts], str | None]
) -> dict[str, list[Facts]]:
    """The ranks by what is said of them; those of which nothing is said are left out."""
    groups: dict[str, list[Facts]] = {}
    for one in facts:
        text = value(one)
        if text is not None:
            groups.setdefault(text, []).append(one)
    return groups


def _who(group: Sequence[Facts], most: int = 4) -> str:
    hosts = list(dict.fromkeys(one.host for one in group))
    more = f" and {len(hosts) - most} more" if len(hosts) > most else ""
    return f"{ranks_text([one.rank for one in group])} ({', '.join(hosts[:most])}{more})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
