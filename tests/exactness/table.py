"""Collects the errors of the exactness tests from all of pytest's workers, and prints them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_PROPERTY = "exactness"
_table: dict[tuple[str, str], dict[str, float]] = {}


@pytest.fixture
def record_error(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Takes layout, scope with precision, mask, and the relative error there."""
    return lambda *cell: record_property(_PROPERTY, cell)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a test recorded, wherever it ran."""
    if report.when != "call":
        return
    for name, value in report.user_properties:
        if name == _PROPERTY:
            layout, column, mask, error = value  # type: ignore[misc]
            _table.setdefault((layout, column), {})[mask] = error  # type: ignore[has-type]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the largest relative error of every layout and scope."""
    if not _table:
        return
    columns = sorted({column for _, column in _table})
    write = terminalreporter.write_line
    terminalreporter.section("gradient against the fp64 oracle: largest relative error over masks")
    write(f"{'layout':32}" + "".join(f"{column:>17}" for column in columns))
    for layout in dict.fromkeys(layout for layout, _ in _table):
        cells = [_table.get((layout, column), {}) for column in columns]
        write(f"{layout:32}" + "".join(f"{_worst(cell):>17}" for cell in cells))
    masks = sorted({mask for cell in _table.values() for mask in cell})
    write(f"masks: {', '.join(masks)}")


def _worst(cell: dict[str, float]) -> str:
    return f"{max(cell.values()):.1e}" if cell else "-"
