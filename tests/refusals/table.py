"""The table of bad inputs in the documentation, which is the list of the cases that are tested.

    python -m tests.refusals.table      # writes the messages of docs/refusals.md anew

To add a case, add a row: what is wrong, the flags or variables given, and no message. Where files
must be damaged, add a function to `tests.refusals.spoil`. Then run the command above.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "refusals.md"


@dataclass(frozen=True)
class Case:
    what: str  # The row's title.
    # Flags after a good command line, or `NAME=value` and `NAME unset`, with DATA, CHECKPOINTS and
    # EMPTY for folders; empty where files are damaged.
    given: str
    message: str  # What the documentation says the program prints.
    line: int  # Index of the row in the document.

    @property
    def environment(self) -> dict[str, str | None]:
        """The variables given, None for one that is unset."""
        if not re.match(r"[A-Z]", self.given):
            return {}
        variables = [variable.partition("=") for variable in self.given.split(", ")]
        return {
            name.removesuffix(" unset"): value if equals else None
            for name, equals, value in variables
        }

    @property
    def flags(self) -> list[str]:
        return [] if self.environment else self.given.split()


def read_cases() -> Iterator[Case]:
    for number, line in enumerate(DOCUMENT.read_text().splitlines()):
        if line.startswith("| ") and not line.startswith("| what is wrong"):
            cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
            what, given, message = (cell.replace("\\|", "|") for cell in cells)
            yield Case(what, given.strip("`"), message, number)


def main() -> None:
    """Runs every case and writes the messages that they end with."""
    from tests.refusals.ground import Ground

    lines = DOCUMENT.read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        for case in read_cases():
            message = ground.message(ground.run(case, Path(folder) / "run"))
            given = f"`{case.given}`" if case.given else ""
            cells = (cell.replace("|", "\\|") for cell in (case.what, given, message))
            lines[case.line] = f"| {' | '.join(cells)} |"
    DOCUMENT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
