"""What the ranks have found out: judged, and printed by rank 0 as one table.

Everything here is a function of what the ranks sent: `facts` are those of all ranks in their order.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_rw.preflight.facts import Facts, amount

Level = Literal["ok", "warning", "problem"]
MAX_HOSTS = 32  # Hosts in the table; --json has all.


@dataclass(frozen=True)
class CheckResult:
    """The result of one check, with a text that names the remedy.

    A job should not be started with a problem.
    """

    level: Level
    text: str


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
    yield from _problems(present, lambda one: one.refusal)


def check_setup(facts: Sequence[Facts]) -> Iterator[CheckResult]:
    """Names software and devices that differ between ranks."""
    differing = {name: groups for name, groups in _setups(facts).items() if len(groups) > 1}
    for name, groups in differing.items():
        most = max(groups, key=lambda version: len(groups[version]))
        others = "; ".join(f"{v} on {_who(g)}" for v, g in groups.items() if v != most)
        yield CheckResult(
            "problem",
            f"{name} differs: {most} on {_count(len(groups[most]), 'rank')}, {others}. Give all "
            "the same.",
        )
    if not differing:
        everyone = f"all {len(facts)} ranks" if len(facts) > 1 else "the one rank"
        yield CheckResult("ok", f"devices and versions are the same on {everyone}.")


def check_collectives(
    facts: Sequence[Facts], problems: Mapping[int, str | None], speeds: Sequence[str]
) -> Iterator[CheckResult]:
    """Tells where collectives fail and which GPUs are slow, by the results of `try_collectives`."""
    failed = _problems(facts, lambda one: problems.get(one.rank))
    slow = [line for line in speeds if line.startswith("OUTLIER ") and "(-" in line]
    yield from failed
    if slow:
        yield CheckResult(
            "warning",
            f"Megatron's GPU sniff test finds ranks far below the median: {'; '.join(slow)}. "
            "All ranks wait for the slowest: look at its links and its GPU.",
        )
    elif not failed:
        yield CheckResult("ok", "all ranks all-reduce together.")


def check_saving(facts: Sequence[Facts], save: str | None) -> list[CheckResult]:
    """Tells whether all ranks can write to --save. Whether it has room, the user has to judge."""
    if save is None:
        text = "the job saves nothing: add --save DIR and --save-interval."
        return [CheckResult("warning", text)]
    where = f"cannot write to --save {save}: "
    failed = _problems(facts, lambda one: one.save_problem and where + one.save_problem)
    if failed:
        return failed
    tried = all(one.free_disk is not None for one in facts)
    text = "all ranks can write there." if tried else "writing to object storage was not tried."
    return [CheckResult("ok", f"--save {save}: {text}")]


def table(facts: Sequence[Facts], speeds: Sequence[str]) -> Iterator[str]:
    """Yields the lines of the table, which tells once what is the same on all ranks."""
    hosts = _grouped(facts, lambda one: one.host)
    yield f"preflight: {_count(len(facts), 'rank')}, {_count(len(hosts), 'host')}"
    for name, groups in _setups(facts).items():
        each = [f"{version} on {_ranks_of(group)}" for version, group in groups.items()]
        yield f"  {name:20} {'; '.join(each) if len(each) > 1 else next(iter(groups))}"
    yield ""
    width = max(map(len, hosts))
    yield f"  {'host':{width}}  {'free disk':>13}  {'free memory':>13}  ranks"
    for host, own in itertools.islice(hosts.items(), MAX_HOSTS):
        disk, memory = _least(one.free_disk for one in own), _least(one.free_memory for one in own)
        yield f"  {host:{width}}  {disk:>13}  {memory:>13}  {_ranks_of(own)}"
    if len(hosts) > MAX_HOSTS:
        yield f"  and {len(hosts) - MAX_HOSTS} more hosts: --json FILE has all"
    for line in speeds:
        yield f"  {line}"


def _least(sizes: Iterable[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return amount(min(known)) if known else "-"


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


def _ranks_of(group: Sequence[Facts]) -> str:
    return ranks_text([one.rank for one in group])


def _setups(facts: Sequence[Facts]) -> dict[str, dict[str, list[Facts]]]:
    """Returns for each entry of the ranks' `setup` the ranks by its value."""
    groups: dict[str, dict[str, list[Facts]]] = {}
    for one in facts:
        for name, value in one.setup.items():
            groups.setdefault(name, {}).setdefault(value, []).append(one)
    return groups


def _problems(facts: Sequence[Facts], problem: Callable[[Facts], str | None]) -> list[CheckResult]:
    """Returns one result for each problem, with all ranks that have it."""
    return [
        CheckResult("problem", f"{_who(group)}: {why.removesuffix('.')}.")
        for why, group in _grouped(facts, problem).items()
    ]


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
    return f"{_ranks_of(group)} ({', '.join(hosts[:most])}{more})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
