"""The table of bad inputs in the documentation.

    python -m tests.refusals.table      # writes docs/refusals.md anew

`test_refusals.py` runs every case and compares its message with the table, word for word.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.refusals import files, flags
from tests.refusals.cases import Case
from tests.refusals.run import Ground

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "refusals.md"
GROUPS = {
    "Flags": flags.FLAGS,
    "Data": files.DATA,
    "Checkpoints and folders": files.CHECKPOINTS,
    "Environment": files.ENVIRONMENT,
}
_HEAD = """# What is refused, and how

Bad input ends the program before it builds anything, with status 2 and one line from rank 0:
`error: ` and the message. {count} cases, each run by a test that compares its message with this
page; `python -m tests.refusals.table` writes the page. DATA, CHECKPOINTS and EMPTY stand for
folders; where nothing is given, a file was damaged.
"""


def row(case: Case, message: str) -> tuple[str, str]:
    """What was given, and what is said, as cells."""
    given = case.flags or ", ".join(
        f"{name} unset" if value is None else f"{name}={value}"
        for name, value in case.environment.items()
    )
    for name in ("data", "checkpoints", "empty"):
        given = given.replace(f"{{{name}}}", name.upper())
    return _cell(f"`{given}`" if given else ""), _cell(message)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_table(messages: dict[str, str]) -> str:
    """The page.

    Args:
        messages: by case.
    """
    lines = [_HEAD.format(count=len(messages))]
    for title, cases in GROUPS.items():
        lines += [f"## {title}", "", "| what is wrong | given | message |", "|---|---|---|"]
        lines += [" | ".join((f"| {c.what}", *row(c, messages[c.what]))) + " |" for c in cases]
        lines.append("")
    return "\n".join(lines)


def read_table(text: str) -> dict[str, tuple[str, str]]:
    """The rows of the page, by what is wrong."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| what is wrong"):
            what, given, message = re.split(r"(?<!\\)\|", line.strip("|"))
            rows[what.strip()] = (given.strip(), message.strip())
    return rows


def main() -> None:
    """Run every case, and write what they say."""
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        messages = {
            case.what: ground.message(ground.run(case, Path(folder) / "run"))
            for cases in GROUPS.values()
            for case in cases
        }
    DOCUMENT.write_text(write_table(messages))


if __name__ == "__main__":
    main()
