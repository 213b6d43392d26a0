"""Command lines that are made from dataclasses."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import arg

from megatron_rw.command_line import parse, require
from megatron_rw.errors import UserError


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a",)
    """Names."""


@dataclass(frozen=True)
class Config:
    inner: Inner
    output_dir: Annotated[Path, arg(metavar="DIR")]
    """Where the output goes,
    which is said in a text that is longer than a line of a terminal."""
    number: int = 1
    fast: bool = False
    numbers: list[int] = field(default_factory=list)
    share: float | None = None
    mode: Literal["all", "none"] = "all"

    def __post_init__(self) -> None:
        require(self.number > 0, "--number", self.number, "a number above 0")


def parsed(line: str) -> Config:
    return parse(Config, line.split(), "Does something.")


def test_flags_are_fields_without_prefixes() -> None:
    assert parsed("--output-dir x") == Config(Inner(), Path("x"))
    config = parsed("--names b c --output-dir=x --number 3 --fast --numbers 4 5")
    assert config == Config(Inner(("b", "c")), Path("x"), 3, True, [4, 5])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"^Missing from \S+: --output-dir DIR \(\S+ --help lists all flags\)$"),
        ("--output-dir x --number 0", "^--number 0: give a number above 0$"),
        (f"--output-dir x --number {'n' * 150}", f"^--number {'n' * 150}: give a whole number "),
        ("--output-dir x --share half", "^--share half: give a number "),
        ("--output-dir x --number", "^--number: give a value "),
        ("--output-dir x --mode some", "^--mode some: choose one of 'all', 'none' "),
        ("--output-dir x --nmber 3", "^Unrecognized options: --nmber"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    line: str, message: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull, "w", encoding=encoding) as output:
        monkeypatch.setattr("sys.stdout", output)
        with pytest.raises(UserError, match=message) as error:
            parsed(line)
    assert "\n" not in str(error.value)


def test_help_prints_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--help")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "Does something." in shown
    # A line of the docstring does not end one of the help.
    assert "goes, which is said" in shown
