"""Pictures of a comparison."""

import io
import itertools
import math
import textwrap
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_rw.comparison.results import ArmResult, Comparison, signed

_COLOURS = {"better": "#15803d", "worse": "#b42318", "equivalent": "#1d4ed8"}
_GREY = "#6b7280"
_PANELS = 3  # in a row of curves
# Text stays text, which may hold a $; the salt makes the same picture the same bytes.
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_rw",
    "text.parse_math": False,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG that is 1800 pixels wide."""
    return _saved(figure, "png", dpi=200)


def svg(figure: Figure) -> str:
    """Returns a figure as an SVG element."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    document = _saved(figure, "svg", metadata=nothing).decode()
    return document[document.index("<svg") :]


@mpl.rc_context(_STYLE)
def _saved(figure: Figure, kind: str, **how: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, **how)
    return content.getvalue()


@mpl.rc_context(_STYLE)
def forest(comparison: Comparison, title: str) -> Figure:
    """Draws the arms' differences with their intervals, the margin, and the band of chance."""
    arms = sorted(comparison.arms, key=lambda arm: -arm.summary.loss.mean)
    figure, axes = _figure(1.9 + 0.42 * len(arms), title)
    margin = comparison.margin
    axes.axvspan(-margin, margin, color="#dbeafe", zorder=0, label=f"margin, ±{margin:g}")
    axes.axvline(0, color="black", linewidth=0.8)
    label: str | None = (
        f"95 % by another order of the data, {comparison.chance.pairs} pairs of "
        f"{comparison.baseline}"
    )
    for row, arm in enumerate(arms):
        loss, colour = arm.summary.loss, _COLOURS.get(arm.verdict, _GREY)
        if arm.band is not None:
            axes.barh(row, 2 * arm.band, 0.8, -arm.band, color="#9ca3af", alpha=0.45, label=label)
            label = None
        if loss.low is not None and loss.high is not None:
            axes.plot([loss.low, loss.high], [row, row], color=colour, linewidth=2.5)
        axes.plot(loss.mean, row, "o", color=colour, markersize=7)
        axes.annotate(
            f"{signed(loss.mean)}  {arm.outcome}",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
        )
    axes.set_yticks(range(len(arms)), [_wrapped(arm.name) for arm in arms])
    axes.set_ylim(-0.7, len(arms) - 0.3)
    axes.use_sticky_edges = False  # of the band's bars
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(
        f"validation loss minus that of {comparison.baseline}, nats per token (left is better)"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


@mpl.rc_context(_STYLE)
def curves(comparison: Comparison) -> Figure:
    """Draws, for each arm, the difference of the curves with its interval."""
    rows = math.ceil(len(comparison.arms) / _PANELS)
    figure = Figure(figsize=(9, 0.8 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, _PANELS, sharex=True, sharey=True, squeeze=False)
    for axes, arm in itertools.zip_longest(panels.flat, comparison.arms):
        if arm is None:
            axes.set_axis_off()
        else:
            _curve(axes, arm)
    figure.supxlabel("tokens", fontsize=11)
    figure.supylabel("difference, nats per token", fontsize=11)
    return figure


def _curve(axes: Axes, arm: ArmResult) -> None:
    found = arm.summary.curve
    colour = _COLOURS.get(arm.verdict, _GREY)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(list(found), [each.mean for each in found.values()], color=colour, marker=".")
    bounds = [(at, each.low, each.high) for at, each in found.items() if each.low is not None]
    if bounds:
        tokens, low, high = map(list, zip(*bounds, strict=True))
        axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_title(_wrapped(arm.name), fontsize=10)


def _figure(height: float, title: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12)
    return figure, axes


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 30, max_lines=3)
