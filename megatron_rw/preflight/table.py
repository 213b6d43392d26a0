"""What all ranks have found out, as one compact table: what is the same everywhere once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from megatron_rw.preflight.facts import Facts, amount
from megatron_rw.preflight.findings import ranks_text
from megatron_rw.preflight.measure import MIB, Clock, Rates, by_host, within_hosts

# Rows for hosts; of thousands the first, and the file of --json has all.
MOST_HOSTS = 32
_NOTHING = "-"
_COLUMNS = ("host", "ranks", "clock", "free disk", "free memory", "within", "neighbours")


def lines(
    facts: Sequence[Facts],
    hosts: Mapping[str, list[int]],
    clock: Mapping[str, Clock],
    rates: Mapping[int, Rates],
) -> Iterator[str]:
    """The table.

    Args:
        facts: of all ranks, in their order.
        hosts: the ranks of each.
        clock: by host, rank 0's not among them.
        rates: by rank; empty for one process.
    """
    yield f"preflight: {_count(len(facts), 'rank')}, {_count(len(hosts), 'host')}"
    yield f"  {'device':20} {_grouped(facts, lambda f: f.device)}"
    for name in facts[0].versions:
        yield f"  {name:20} {_grouped(facts, lambda f, n=name: f.versions.get(n, 'unknown'))}"  # type: ignore[misc]
    yield ""
    rows = [_row(ranks, facts, clock.get(host), rates) for host, ranks in hosts.items()]
    columns = [
        column
        for column in zip(_COLUMNS, *rows[:MOST_HOSTS], strict=True)
        if any(cell != _NOTHING for cell in column[1:])
    ]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  " + "  ".join(cells).rstrip()
    if len(rows) > MOST_HOSTS:
        yield f"  and {len(rows) - MOST_HOSTS} more hosts: --json FILE has all"
    if rates:
        yield ""
        yield "  all-reduce, bus bandwidth"
        yield from _all_reduce("over all ranks", [r.world for r in rates.values()])
        yield from _all_reduce("over one rank of each host", [r.hosts for r in rates.values()])


def _row(
    ranks: Sequence[int],
    facts: Sequence[Facts],
    clock: Clock | None,
    rates: Mapping[int, Rates],
) -> tuple[str, ...]:
    own = [facts[rank] for rank in ranks]
    disks = [f.free_disk for f in own if f.free_disk is not None]
    memories = [f.free_memory for f in own if f.free_memory is not None]
    host = {own[0].host: list(ranks)}
    within, with_others = within_hosts(host, rates), by_host(host, rates)
    return (
        own[0].host,
        ranks_text(ranks).split(" ", 1)[1],
        f"{1000 * clock.ahead:+.1f} ms ± {500 * clock.round_trip:.1f}" if clock else _NOTHING,
        amount(min(disks)) if disks else _NOTHING,
        amount(min(memories)) if memories else _NOTHING,
        *(f"{v[own[0].host] / 1e9:.2f} GB/s" if v else _NOTHING for v in (within, with_others)),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _grouped(facts: Sequence[Facts], value: Callable[[Facts], str]) -> str:
    groups: dict[str, list[int]] = {}
    for rank in facts:
        groups.setdefault(value(rank), []).append(rank.rank)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{text} on {ranks_text(ranks)}" for text, ranks in groups.items())


def _all_reduce(what: str, measured: Sequence[Mapping[int, float]]) -> Iterator[str]:
    measured = [rates for rates in measured if rates]
    if measured:
        # Of all who were part of it the slowest: they wait for each other, so that differences
        # are those of the clock alone.
        text = "; ".join(
            f"{size / MIB:g} MiB: {min(rates[size] for rates in measured) / 1e9:.2f} GB/s"
            for size in measured[0]
        )
        yield f"    {what + ':':28} {text}"
