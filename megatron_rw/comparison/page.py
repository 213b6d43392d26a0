"""The page of a comparison: one HTML file that needs nothing else."""

from collections.abc import Sequence
from html import escape

from megatron_rw.comparison import figures, tables
from megatron_rw.comparison.results import Comparison
from megatron_rw.comparison.runs import OF_DOMAIN

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.outcome { font-size: 1.15rem; border-left: 4px solid #1d4ed8; padding-left: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.3rem 0.5rem; border-bottom: 1px solid #e5e7eb;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
svg { width: 100%; height: auto; }
.warning { color: #92400e; }
"""


def render(comparison: Comparison, title: str) -> str:
    """Returns the page. The same comparison gives the same text."""
    domains = {
        arm.name: {
            name.removeprefix(OF_DOMAIN): found.mean
            for name, found in arm.summary.differences.items()
            if name.startswith(OF_DOMAIN)
        }
        for arm in comparison.arms
    }
    weights = {arm.name: arm.summary.weight_ratios for arm in comparison.arms}
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="outcome">{escape(comparison.headline)}</p>',
        *(f'<p class="warning">{escape(text)}</p>' for text in comparison.warnings),
        figures.svg(figures.forest(comparison, "")),
        _table(tables.overview(comparison)),
        f"<p>{escape(comparison.rule)}</p>",
        "<h2>Differences over training</h2>",
        figures.svg(figures.curves(comparison)),
    ]
    for head, rows, centre, digits in (
        (f"Validation loss minus that of {comparison.baseline}, by domain", domains, 0.0, 3),
        ("Share of the weight over share of the samples, by domain", weights, 1.0, 2),
    ):
        if shown := {name: row for name, row in rows.items() if row}:
            body += [f"<h2>{escape(head)}</h2>", figures.svg(figures.heat(shown, centre, digits))]
    body += [
        f"<h2>All measures: {escape(comparison.baseline)}, and differences from it</h2>",
        _table(tables.all_measures(comparison)),
        "<details><summary>Each pair of runs</summary>",
        *(f"<h2>{escape(arm.name)}</h2>{_table(tables.pairs(arm))}" for arm in comparison.arms),
        "</details>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_CSS}</style>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(table: Sequence[Sequence[str]]) -> str:
    head, *rows = (
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(("th", *["td"] * (len(table) - 1)), table, strict=True)
    )
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
