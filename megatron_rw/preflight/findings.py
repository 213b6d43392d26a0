"""What is wrong, and what to change: pure functions of what the ranks have found out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rw.preflight.facts import Facts, amount
from megatron_rw.preflight.measure import Clock

if TYPE_CHECKING:
    # Imports Megatron, which has to wait until the device is chosen.
    from megatron_rw.preflight.estimate import Estimate

Level = Literal["ok", "warning", "problem"]
# Seconds between clocks from which logs and file times of two hosts can no longer be ordered.
MOST_SKEW_S = 1.0
# Of the median bandwidth: a host below it is slow.
SLOW = 0.5
# Of a GPU's memory: what an estimate may take before it is said to be close.
CLOSE = 0.9


@dataclass(frozen=True)
class Finding:
    """A verdict.

    Attributes:
        level: whether the job should start.
        text: for people, with the remedy.
    """

    level: Level
    text: str


def absences(missing: Sequence[int], present: Iterable[Facts], wait_s: float) -> list[Finding]:
    """Ranks that have not come, and ranks on which the job would not start."""
    found = []
    if missing:
        found.append(
            Finding(
                "problem",
                f"{ranks_text(missing)} did not arrive within {wait_s:g} s (--wait-seconds): see "
                "that all processes were started, on nodes that are up, and reach MASTER_ADDR.",
            )
        )
    by_text: dict[str, list[Facts]] = {}
    for facts in present:
        if facts.refusal is not None:
            by_text.setdefault(facts.refusal, []).append(facts)
    found += [Finding("problem", f"{_who(group)}: {text}") for text, group in by_text.items()]
    return found


def versions(facts: Sequence[Facts]) -> list[Finding]:
    """Software and devices that differ between ranks."""
    found = []
    names = facts[0].versions
    columns = {name: [f.versions.get(name, "unknown") for f in facts] for name in names}
    columns["device"] = [f.device for f in facts]
    for name, values in columns.items():
        groups: dict[str, list[Facts]] = {}
        for value, rank in zip(values, facts, strict=True):
            groups.setdefault(value, []).append(rank)
        if len(groups) > 1:
            most = max(groups, key=lambda value: len(groups[value]))
            others = "; ".join(f"{v} on {_who(g)}" for v, g in groups.items() if v != most)
            found.append(
                Finding(
                    "problem",
                    f"{name} differs: {most} on {len(groups[most])} ranks, {others}. Give all the "
                    "same.",
                )
            )
    return found or [Finding("ok", f"devices and versions are the same on {_all(facts)}.")]


def clocks(measured: Mapping[str, Clock]) -> list[Finding]:
    """Clocks that are off.

    Args:
        measured: by host, rank 0's not among them.
    """
    if not measured:
        return []
    off = {h: clock.ahead for h, clock in measured.items() if abs(clock.ahead) > MOST_SKEW_S}
    if not off:
        return [Finding("ok", f"clocks agree with rank 0's to within {MOST_SKEW_S:g} s.")]
    hosts = ", ".join(f"{host} by {ahead:+.1f} s" for host, ahead in off.items())
    return [
        Finding(
            "warning",
            f"clocks differ from rank 0's: {hosts}. Logs and file times cannot be ordered: see "
            "that NTP runs there.",
        )
    ]


def saving(
    facts: Sequence[Facts], save: str | None, checkpoint_bytes: float | None, wanted: int
) -> list[Finding]:
    """Whether --save can be written to, and holds enough.

    Args:
        facts: of all ranks.
        save: the folder.
        checkpoint_bytes: of one checkpoint, estimated; None when unknown.
        wanted: how many the disk should have room for.
    """
    if save is None:
        return [Finding("warning", "the job saves nothing: add --save DIR and --save-interval.")]
    groups: dict[str, list[Facts]] = {}
    for rank in facts:
        if rank.save_problem is not None:
            groups.setdefault(rank.save_problem, []).append(rank)
    if groups:
        return [
            Finding("problem", f"{_who(group)} cannot write to --save {save}: {text}.")
            for text, group in groups.items()
        ]
    tried = [rank for rank in facts if rank.free_disk is not None]
    if not tried or checkpoint_bytes is None:
        return [Finding("ok", f"--save {save}: its room was not compared with a checkpoint.")]
    least = min(tried, key=lambda rank: rank.free_disk or 0)
    free = float(least.free_disk or 0)
    room = (
        f"--save {save}: {amount(free)} are free on {least.host}, a checkpoint takes about "
        f"{amount(checkpoint_bytes)}"
    )
    if free >= wanted * checkpoint_bytes:
        return [Finding("ok", f"{room}; all ranks can write there. A quota does not show in this.")]
    level: Level = "problem" if free < checkpoint_bytes else "warning"
    return [
        Finding(
            level,
            f"{room}, and there should be room for {wanted} (--room-for-checkpoints): make room, "
            "keep fewer with --keep-last, or save elsewhere.",
        )
    ]


def slow_hosts(kind: str, rates: Mapping[str, float]) -> list[Finding]:
    """Hosts whose bandwidth is far below that of the others.

    Args:
        kind: between whom it was measured.
        rates: bytes a second by host.
    """
    if len(rates) < 2:
        return []
    median = statistics.median(rates.values())
    slow = {host: rate for host, rate in rates.items() if rate < SLOW * median}
    if not slow:
        return [Finding("ok", f"bandwidth {kind}: no host is far below the median.")]
    hosts = ", ".join(f"{host} {rate / 1e9:.2f} GB/s" for host, rate in slow.items())
    return [
        Finding(
            "problem",
            f"bandwidth {kind}: {hosts}, where the median is {median / 1e9:.2f} GB/s. All ranks "
            "wait for the slowest: take it out of the job, or look at its links and its GPUs.",
        )
    ]


def memory(facts: Sequence[Facts], needed: Estimate | None, advice: str) -> list[Finding]:
    """Whether the job fits the GPUs, by Megatron's formulas.

    Args:
        facts: of all ranks.
        needed: the estimate, None when Megatron has no formula.
        advice: flags that lower the memory.
    """
    with_memory = [rank for rank in facts if rank.device_memory is not None]
    if needed is None:
        return [Finding("ok", "memory: Megatron has no formula for a hybrid model.")]
    if not with_memory:
        return [Finding("ok", "memory: there is no GPU to compare the estimate with.")]
    smallest = min(with_memory, key=lambda rank: rank.device_memory or 0)
    has = float(smallest.device_memory or 0)
    text = f"memory: about {amount(needed.memory_bytes)} by Megatron's formulas, of {amount(has)}"
    if needed.memory_bytes > has:
        return [Finding("problem", f"{text} on {smallest.host}. Lower it with {advice}.")]
    taken = [rank for rank in with_memory if float(rank.free_memory or 0) < needed.memory_bytes]
    if taken:
        free = amount(min(rank.free_memory or 0 for rank in taken))
        return [
            Finding(
                "problem",
                f"{text}, but only {free} are free on {_who(taken)}: end the processes "
                "that hold the rest (nvidia-smi).",
            )
        ]
    if needed.memory_bytes > CLOSE * has:
        return [
            Finding(
                "warning",
                f"{text} on {smallest.host}, which is close: the formulas leave things out. To "
                f"lower it: {advice}.",
            )
        ]
    return [Finding("ok", f"{text}.")]


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 8-15`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _who(group: Sequence[Facts], most: int = 4) -> str:
    hosts = list(dict.fromkeys(facts.host for facts in group))
    more = f" and {len(hosts) - most} more" if len(hosts) > most else ""
    return f"{ranks_text([f.rank for f in group])} ({', '.join(hosts[:most])}{more})"


def _all(facts: Sequence[Facts]) -> str:
    return f"all {len(facts)} ranks" if len(facts) > 1 else "the one rank"
