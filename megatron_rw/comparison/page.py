"""The page of a comparison: one HTML file that needs nothing else."""

from collections.abc import Sequence
from html import escape

from megatron_rw.comparison import figures, tables
from megatron_rw.comparison.results import Comparison

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
    base = escape(comparison.baseline)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="outcome">{escape(comparison.headline)}</p>',
        *(f'<p class="warning">{escape(text)}</p>' for text in comparison.warnings),
        figures.svg(figures.forest(comparison, "")),
        _table(tables.overview(comparison)),
        f"<p>{escape(comparison.rule)}</p>",
        "<h2>Differences over training</h2>",
        figures.svg(figures.curves(comparison)),
        f"<h2>All measures: {base}, and differences from it</h2>",
        _table(tables.all_measures(comparison)),
    ]
    if domains := tables.by_domain(comparison):
        head = f"<h2>Validation loss by domain: {base}, and differences from it</h2>"
        body += [head, _table(domains)]
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
