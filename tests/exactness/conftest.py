"""Collects the errors of the exactness table and prints it at the end of the session."""

from __future__ import annotations

import pytest

_table: dict[tuple[str, str], dict[str, float]] = {}


@pytest.fixture
def exactness_table() -> dict[tuple[str, str], dict[str, float]]:
    """Relative error by mask, by layout and by scope with precision."""
    return _table


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
