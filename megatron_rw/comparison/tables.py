"""Tables of a comparison, as cells of text for the terminal and the page."""

from collections.abc import Sequence

from megatron_rw.comparison.inference import Estimate
from megatron_rw.comparison.measuring import Summary
from megatron_rw.comparison.results import Comparison, signed
from megatron_rw.comparison.runs import LOSS, NOISE, OF_DOMAIN, WORST

Table = list[list[str]]


def overview(comparison: Comparison) -> Table:
    """Returns a row for each arm; columns without a value are left out."""
    base = comparison.baseline_values
    head = "arm,n,loss,95 % interval,p (Holm),verdict,found from,tokens,logit scale,noise,worst,ESS"
    rows = [head.split(",")]
    absolute = [_number(base.get(name)) for name in ("logit_scale", NOISE, WORST, "ess")]
    rows.append([comparison.baseline, "", _number(base[LOSS]), *[""] * 5, *absolute])
    for arm in comparison.arms:
        found = arm.summary
        rows.append(
            [
                arm.name,
                str(found.loss.n),
                signed(found.loss.mean),
                interval(found.loss),
                "" if arm.p_value is None else f"{arm.p_value:.3g}",
                arm.outcome,
                _number(arm.smallest_found),
                _tokens(found) if comparison.evaluated else "",
                _number(found.values.get("logit_scale")),
                *(mean(found.differences.get(name)) for name in (NOISE, WORST)),
                _number(found.values.get("ess")),
            ]
        )
    used = [any(row[i] for row in rows[1:]) for i in range(len(rows[0]))]
    return [[cell for cell, there in zip(row, used, strict=True) if there] for row in rows]


def by_domain(comparison: Comparison) -> Table:
    """Returns the baseline's loss of each domain, the arms' differences, and their weights.

    A weight is the domain's share of the weight over its share of the samples. There is no row
    where no domain was measured.
    """
    base = comparison.baseline_values
    names = [name.removeprefix(OF_DOMAIN) for name in base if name.startswith(OF_DOMAIN)]
    if not names:
        return []
    rows = [["by domain", *names]]
    rows.append([comparison.baseline, *(_number(base[OF_DOMAIN + name]) for name in names)])
    for arm in comparison.arms:
        found, weights = arm.summary.differences, arm.summary.weight_ratios
        rows.append([arm.name, *(mean(found.get(OF_DOMAIN + name)) for name in names)])
        if weights:
            rows.append(["  its weights", *(_number(weights.get(name)) for name in names)])
    return rows


def all_measures(comparison: Comparison) -> Table:
    """Returns the difference of every measure of every arm, and the baseline's own values."""
    names = dict.fromkeys(name for arm in comparison.arms for name in arm.summary.differences)
    rows = [["arm", *names]]
    rows.append(
        [comparison.baseline, *(_number(comparison.baseline_values.get(name)) for name in names)]
    )
    for arm in comparison.arms:
        found = [arm.summary.differences.get(name) for name in names]
        rows.append([arm.name, *(f"{mean(each)} {each and interval(each)}" for each in found)])
    return rows


def text(table: Table) -> str:
    """Returns a table in columns, the first to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(cells).rstrip()

    head, *rows = map(line, table)
    return "\n".join([head, "-" * (sum(widths) + 2 * len(widths) - 2), *rows])


def interval(found: Estimate) -> str:
    """Returns the 95 % interval, or nothing if there is none."""
    if found.low is None or found.high is None:
        return ""
    return f"[{signed(found.low)}, {signed(found.high)}]"


def mean(found: Estimate | None) -> str:
    """Returns a mean difference, or nothing if it was not measured."""
    return "" if found is None else signed(found.mean)


def _tokens(found: Summary) -> str:
    if found.tokens_to_baseline is not None:
        return f"{found.tokens_to_baseline:.2f}"
    return f"{found.reached} of {len(found.pairs)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
