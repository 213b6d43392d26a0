"""What preprocess_data says: what is bad, and what it made."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_rw.data.indexed.parts import Counts, Rejects
from megatron_rw.data.progress import duration
from megatron_rw.errors import UserError


def too_many_bad(rejects: Rejects, records: int, allowed: float, listed: Path) -> UserError:
    """The error of more rejected lines than allowed; it shows the first of each kind.

    Args:
        rejects: the rejected lines.
        records: the number of lines that were taken, or may yet be.
        allowed: `--max-bad-fraction`.
        listed: where all rejected lines are.
    """
    worst = sorted(rejects.counts, key=lambda kind: -rejects.counts[kind])
    examples = "".join(
        f"\n  {rejects.counts[kind]:,} x {kind}; {path}, line {line}: {reason}"
        for kind in worst
        for path, line, reason in rejects.examples[kind][:1]
    )
    return UserError(
        f"{rejects.total:,} of {rejects.total + records:,} lines are bad, more than "
        f"--max-bad-fraction {allowed:g} allows; correct them, or allow more and repeat the call, "
        f"which goes on from what is done. All of them are in {listed}{examples}"
    )


def table(counts: Mapping[str, Counts], rejects: Rejects, duplicates: int, seconds: float) -> str:
    """What was made, a line per domain and one for all; rejected lines by kind below."""
    total = Counts()
    for count in counts.values():
        total.add(count)
    width = max(len("domain"), *map(len, counts))
    lines = [
        f"{'domain':<{width}} {'documents':>12} {'tokens':>15} {'bytes/token':>11} {'share':>7}"
    ]
    for name, count in [*counts.items(), ("all", total)]:
        lines.append(
            f"{name:<{width}} {count.documents:>12,} {count.tokens:>15,} "
            f"{count.text_bytes / count.tokens:>11.2f} {count.tokens / total.tokens:>7.1%}"
        )
    if rejects.total:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in rejects.counts.items())
        lines.append(f"rejected: {rejects.total:,} lines ({kinds}), listed in rejects.jsonl")
    if duplicates:
        lines.append(f"duplicates left out: {duplicates:,}")
    speed = total.text_bytes / 1e6 / seconds
    lines.append(f"{total.text_bytes / 1e6:,.1f} MB in {duration(seconds)}, {speed:.1f} MB/s")
    return "\n".join(lines)


def say(message: str) -> None:
    """Prints a line about the work itself."""
    print(f"preprocess_data: {message}", file=sys.stderr, flush=True)
