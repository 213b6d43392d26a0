"""Reads the Dockerfile and .dockerignore: as much of their languages as this project uses.

Whatever it does not know it refuses, so that what is checked is the file and not a part of it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ("ARG", "CMD", "COPY", "ENV", "FROM", "HEALTHCHECK", "LABEL", "RUN", "USER", "WORKDIR")


class DockerfileError(ValueError):
    """Something in the file that this reader does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined.

    Attributes:
        name: in capitals.
        text: the rest.
        line: its first line in the file, from 1.
    """

    name: str
    text: str
    line: int

    def words(self, variables: Mapping[str, str]) -> list[str]:
        """The text as words, with variables put in.

        Args:
            variables: of ARG and ENV; others become empty, as in Docker.
        """
        return [_substituted(word, variables) for word in shlex.split(self.text)]

    def command(self) -> list[str]:
        """What a CMD or HEALTHCHECK starts.

        Raises:
            DockerfileError: it is not in the exec form, `["program", "word"]`.
        """
        text = self.text[self.text.find("[") :]
        try:
            return [str(word) for word in json.loads(text)]
        except ValueError as error:
            raise DockerfileError(f"line {self.line}: {self.text}: not the exec form") from error


@dataclass(frozen=True)
class Stage:
    """A target.

    Attributes:
        name: after AS.
        base: the image that it starts from.
        arguments: the ARGs before the first FROM.
        instructions: in order, without FROM.
    """

    name: str
    base: str
    arguments: Mapping[str, str]
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, name: str) -> list[Instruction]:
        """The instructions of a kind."""
        return [i for i in self.instructions if i.name == name]

    def variables(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """What ARG and ENV have set at the end of the stage.

        Args:
            given: as by --build-arg.
        """
        values: dict[str, str] = {}
        for instruction in self.instructions:
            values = self.after(instruction, values, given or {})
        return values

    def after(
        self, instruction: Instruction, values: Mapping[str, str], given: Mapping[str, str]
    ) -> dict[str, str]:
        """The variables once an instruction is done."""
        changed = dict(values)
        for word in instruction.words(values) if instruction.name in ("ARG", "ENV") else ():
            key, _, value = word.partition("=")
            if instruction.name == "ARG" and key in given:
                value = given[key]
            elif instruction.name == "ARG" and "=" not in word:
                value = self.arguments[key]
            changed[key] = value
        return changed


def read(path: Path = ROOT / "Dockerfile") -> dict[str, Stage]:
    """The stages by name; the last is what `docker build` makes.

    Raises:
        DockerfileError: an instruction, or a form of one, that this reader does not know.
    """
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    for instruction in _instructions(path.read_text()):
        if instruction.name == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", instruction.text)
            if not match:
                raise DockerfileError(f"line {instruction.line}: FROM without AS")
            stages[match[2]] = Stage(match[2], match[1], arguments)
        elif stages:
            next(reversed(stages.values())).instructions.append(instruction)
        else:
            key, _, value = shlex.split(instruction.text)[0].partition("=")
            arguments[key] = value
    return stages


def _instructions(text: str) -> Iterable[Instruction]:
    gathered, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or (not gathered and not line.strip()):
            continue
        first = first if gathered else number
        gathered += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        name, _, rest = gathered.strip().partition(" ")
        if name not in KNOWN or "<<" in rest:
            raise DockerfileError(f"line {first}: {name}: this reader does not know it")
        yield Instruction(name, rest.strip(), first)
        gathered = ""


def _substituted(word: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ""), word)


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether .dockerignore keeps a file out of the build: its last pattern that matches decides.

    Args:
        path: relative to the context. A pattern for a folder goes for all that is in it.
        patterns: the file's lines.
    """
    parts = path.split("/")
    ancestors = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    excluded = False
    for line in patterns:
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            keep = pattern.startswith("!")
            expression = _expression(pattern.removeprefix("!").strip("/"))
            if any(expression.fullmatch(ancestor) for ancestor in ancestors):
                excluded = not keep
    return excluded


def _expression(pattern: str) -> re.Pattern[str]:
    if re.search(r"[\[\]?\\]", pattern):
        raise DockerfileError(f".dockerignore: {pattern}: this reader does not know it")
    tokens = re.split(r"(\*\*/|\*\*|\*)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return re.compile("".join(meaning.get(token, re.escape(token)) for token in tokens))


def copied(instruction: Instruction, files: Iterable[str]) -> dict[str, str]:
    """What a COPY takes.

    Args:
        instruction: without flags; sources are files or folders, `.` is the context.
        files: of the context, relative, without the ignored ones.

    Returns:
        File to where it goes, relative to WORKDIR.

    Raises:
        DockerfileError: a flag, a pattern, or a source that takes nothing.
    """
    *sources, target = instruction.words({})
    if any(word.startswith("--") or "*" in word for word in [*sources, target]):
        raise DockerfileError(f"line {instruction.line}: {instruction.text}: not known here")
    taken: dict[str, str] = {}
    for source in (source.rstrip("/") for source in sources):
        found = {}
        for file in files:
            if file == source:
                found[file] = f"{target}/{Path(file).name}" if target.endswith("/") else target
            elif source == "." or file.startswith(f"{source}/"):
                found[file] = f"{target}/{file if source == '.' else file[len(source) + 1 :]}"
        if not found:
            raise DockerfileError(f"line {instruction.line}: COPY {source}: takes nothing")
        taken |= found
    return {file: str(Path(where)) for file, where in taken.items()}


def context(root: Path = ROOT) -> list[str]:
    """The files that a build gets: all below `root` that .dockerignore lets through."""
    patterns = (root / ".dockerignore").read_text().splitlines()
    kept = []
    for folder, folders, names in root.walk():
        if folder == root:
            # Where nothing can be let through, and there is much of it.
            folders[:] = [name for name in folders if not ignored(name, patterns)]
        kept += [str((folder / name).relative_to(root)) for name in names]
    return sorted(file for file in kept if not ignored(file, patterns))
