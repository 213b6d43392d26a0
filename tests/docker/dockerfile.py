"""Reads the Dockerfile, which hadolint checks, and tells in shell what its instructions do."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pathspec

ROOT = Path(__file__).resolve().parents[2]


class Instruction(NamedTuple):
    """An instruction: its name in capitals, and the rest with continued lines joined."""

    name: str
    text: str


Stage = list[Instruction]


def read() -> dict[str, Stage]:
    """The stages by name, each from its FROM on; the last is what `docker build` makes."""
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    for line in filter(None, "\n".join(lines).replace("\\\n", " ").splitlines()):
        name, text = line.split(maxsplit=1)
        if name == "FROM":
            stage = stages[text.split(" AS ")[1]] = []
        if not stages:
            arguments[text.split("=")[0]] = text
        else:
            # A name without a default has that of the ARG before the first FROM.
            stage.append(Instruction(name, arguments.get(text, text)))
    return stages


def arguments_of(stage: Stage) -> dict[str, str]:
    """The defaults of its ARGs."""
    words = [word for name, text in stage if name == "ARG" for word in shlex.split(text)]
    return dict(word.split("=", 1) for word in words)


def in_shell(instructions: Iterable[Instruction], context: Path) -> str:
    """A script that does what the instructions do, but for their user.

    COPY takes files from the context. An ARG that is a variable already keeps its value.
    """
    lines = ["set -e"]
    for name, text in instructions:
        if name == "ARG":
            lines.append(f": ${{{text}}}; export {text.split('=')[0]}")
        elif name == "ENV":
            lines.append(f"export {text}")
        elif name == "WORKDIR":
            lines.append(f"mkdir -p {text}; cd {text}")
        elif name == "COPY":
            *sources, target = text.split()
            lines.append(f"mkdir -p {target}")
            for source in sources:
                # Of a folder, COPY takes what is in it.
                inside = "/." if (ROOT / source).is_dir() else ""
                lines.append(f"cp -r {context}/{source}{inside} {target}")
        elif name == "RUN":
            lines.append(f"sh -c {shlex.quote(text)}")
    return "\n".join(lines)


def dockerignore() -> pathspec.PathSpec[pathspec.Pattern]:
    """Matches what .dockerignore keeps out of a build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return pathspec.PathSpec.from_lines("gitignore", lines)


def write_context(folder: Path) -> list[str]:
    """Copies what a build gets, files that are not committed yet included, and lists it."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.check_output(listing, cwd=ROOT, text=True).splitlines()
    ignored = dockerignore()
    files = [f for f in files if (ROOT / f).exists() and not ignored.match_file(f)]
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    return files
