"""Tells honestly whether one way of training is better than another."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from megatron_rw.command_line import parse
from megatron_rw.comparison.settings import Settings
from megatron_rw.errors import UserError, reported
from megatron_rw.platform.files import complete_file, write_complete, write_json

_DESCRIPTION = """\
Compare ways of training, arms, with a baseline, from the --log-dir folders of their runs.

examples:
  python tools/compare_runs.py none=study/*/none linupper=study/*/linupper --output report
  python tools/compare_runs.py study/*/* --title 'Five trunks'
"""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """The flags of compare_runs."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME=GLOB [NAME=GLOB ...]")]
    """Folders of runs, and the arm that they belong to. Without NAME=, arms are made of the runs'
    --reweight-* arguments."""

    output: Annotated[Path | None, arg(metavar="PREFIX")] = None
    """Write PREFIX.html, a page with pictures, PREFIX.png, its main picture, and PREFIX.json, all
    numbers."""

    title: str = "Comparison of runs"
    """Title of the page and the picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UserError("give the folders of runs, NAME=GLOB for each arm")
        if self.output is not None and not self.output.absolute().parent.is_dir():
            folder = self.output.parent
            raise UserError(f"--output {self.output}: there is no directory {folder}; make it")
        needed = ["scipy"] if self.output is None else ["scipy", "matplotlib"]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"a comparison needs what is not installed; run: pip install {' '.join(missing)}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    with reported("comparing runs"):
        _run(parse(CompareConfig, argv, _DESCRIPTION))
    return 0


def _run(config: CompareConfig) -> None:
    # They need scipy, and _write matplotlib.
    from megatron_rw.comparison import tables
    from megatron_rw.comparison.pairing import load_arms
    from megatron_rw.comparison.results import compare

    comparison = compare(load_arms(config.runs), config)
    print(f"{comparison.headline}\n\n{tables.text(tables.overview(comparison))}\n")
    if domains := tables.by_domain(comparison):
        print(f"{tables.text(domains)}\n")
    print(comparison.rule)
    for warning in comparison.warnings:
        print(f"warning: {warning}")
    if config.output is not None:
        from megatron_rw.comparison import figures, page

        # with_name and not with_suffix: a prefix may hold a point.
        html, png, numbers = (
            config.output.with_name(f"{config.output.name}.{kind}")
            for kind in ("html", "png", "json")
        )
        write_complete(html, page.render(comparison, config.title))
        with complete_file(png) as file:
            file.write(figures.png(figures.forest(comparison, config.title)))
        write_json(numbers, dataclasses.asdict(comparison))
        print(f"\nwrote {html}, {png} and {numbers}")
