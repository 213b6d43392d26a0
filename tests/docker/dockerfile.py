"""Reads the Dockerfile, which hadolint checks, and tells what its instructions do."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import string
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pathspec

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str  # In capitals.
    text: str  # The rest.

    def command(self) -> list[str]:
        """What a CMD or HEALTHCHECK in the exec form, `["program", "word"]`, starts."""
        return [str(word) for word in json.loads(self.text[self.text.index("[") :])]

    def copy(self, folder: Path) -> None:
        """Carries out a COPY of files, folders or `.` into a folder."""
        *sources, target = self.text.split()
        for source in (source.rstrip("/") for source in sources):
            taken = [f for f in context() if source in (".", f) or f.startswith(f"{source}/")]
            assert taken, f"COPY {source} takes nothing"
            for file in taken:
                below = Path(file).name if file == source else file.removeprefix(f"{source}/")
                where = folder / target / below if file != source or target[-1] == "/" else target
                (folder / where).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, folder / where)


@dataclass(frozen=True)
class Stage:
    """A target."""

    base: str  # The image that it starts from.
    arguments: Mapping[str, str]  # The ARGs before the first FROM.
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, name: str) -> list[Instruction]:
        """The instructions of a kind."""
        return [i for i in self.instructions if i.name == name]

    def variables(
        self, before: Mapping[str, str], instructions: Iterable[Instruction] | None = None
    ) -> dict[str, str]:
        """The variables after ARG and ENV of the stage, or of some instructions of it."""
        values = dict(before)
        for instruction in self.instructions if instructions is None else instructions:
            for word in shlex.split(instruction.text) if instruction.name in ("ARG", "ENV") else ():
                key, equals, value = word.partition("=")
                values[key] = string.Template(value if equals else self.arguments[key]).substitute(
                    values
                )
        return values


def read() -> dict[str, Stage]:
    """The stages by name; the last is what `docker build` makes."""
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    for text in filter(None, "\n".join(lines).replace("\\\n", " ").splitlines()):
        name, rest = text.split(maxsplit=1)
        if name == "FROM":
            base, stage = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            stages[stage] = Stage(base, arguments)
        elif stages:
            next(reversed(stages.values())).instructions.append(Instruction(name, rest))
        else:
            arguments[rest.split("=")[0]] = shlex.split(rest)[0].partition("=")[2]
    return stages


@functools.cache
def dockerignore() -> pathspec.PathSpec[pathspec.Pattern]:
    """Matches what .dockerignore keeps out of a build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return pathspec.PathSpec.from_lines("gitignore", lines)


def context() -> list[str]:
    """Our files that a build gets, those that are not committed yet included."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.check_output(listing, cwd=ROOT, text=True).splitlines()
    return [f for f in files if (ROOT / f).exists() and not dockerignore().match_file(f)]
