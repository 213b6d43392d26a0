"""Reads parts of inputs that are too large to read, spread over the whole of them.

Of plain files windows are read, evenly spaced over all files together; a compressed file can only
be read from its start, so of those evenly spaced ones are read, each to its end. Which they are
follows from the sizes alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rw.data.command import InputError
from megatron_rw.data.jsonl import parse_record, read_lines, string_field

_WINDOW_BYTES = 1 << 20
_COUNT_BYTES = 1 << 20
# What a byte of compressed text comes to. It decides only how many files are read.
_EXPANSION = 4


@dataclass(frozen=True)
class Part:
    """Some lines of a file.

    Attributes:
        path: The file.
        start: Offset in bytes; the lines that begin from here on are read.
        end: The lines that begin before this are read; None for all.
        fraction: The share of such parts that are read at all.
    """

    path: Path
    start: int
    end: int | None
    fraction: float


def volume(path: Path) -> int:
    """About how many bytes reading a file gives."""
    return path.stat().st_size * (1 if _can_seek(path) else _EXPANSION)


def plan(paths: Sequence[Path], max_bytes: int) -> list[Part]:
    """Chooses what to read of some files.

    Args:
        paths: The files.
        max_bytes: Bytes to read of all of them together, uncompressed; of compressed files about,
            and at least one of them.

    Returns:
        Parts in the order of the files; each file whole, if that is no more than `max_bytes`.
    """
    total = sum(map(volume, paths))
    if total <= max_bytes:
        return [Part(path, 0, None, 1.0) for path in paths]
    share = max_bytes / total
    windows = _Spaced(sum(_windows(path) for path in paths if _can_seek(path)), share)
    whole_files = _Spaced(sum(not _can_seek(path) for path in paths), share)
    parts = []
    for path in paths:
        if _can_seek(path):
            parts += [
                Part(path, start, start + _WINDOW_BYTES, windows.fraction)
                for start in range(0, _windows(path) * _WINDOW_BYTES, _WINDOW_BYTES)
                if windows.take()
            ]
        elif whole_files.take():
            parts.append(Part(path, 0, None, whole_files.fraction))
    return parts


class _Spaced:
    """Takes about a share of so many, evenly spaced, and at least one."""

    def __init__(self, count: int, share: float) -> None:
        self._count = count
        self._taken = max(1, int(count * share))
        # From the middle: the first of a long row of files is no better than any other.
        self._phase = count // 2

    @property
    def fraction(self) -> float:
        return self._taken / self._count

    def take(self) -> bool:
        self._phase = (self._phase + self._taken) % self._count
        return self._phase < self._taken


def _windows(path: Path) -> int:
    return -(-path.stat().st_size // _WINDOW_BYTES)


def _can_seek(path: Path) -> bool:
    return path.suffix == ".jsonl"


def read_documents(part: Part, json_key: str, domain_key: str | None) -> Iterator[tuple[str, str]]:
    """Yields `(domain, text)` of every document of a part.

    Args:
        part: What to read.
        json_key: Field of the text.
        domain_key: Field of the domain; None takes it from the file's name.

    Raises:
        InputError: At the first bad line.
    """
    for number, line in _lines(part):
        try:
            document = _parse(line, part.path, number, json_key, domain_key)
        except InputError:
            # In the middle of a file a line's number is known only by counting, a terabyte maybe.
            before = _lines_before(part.path, part.start)
            _parse(line, part.path, before + number, json_key, domain_key)
            raise
        yield document


def domain_of_file(path: Path) -> str:
    """Returns a file's name up to the first dot."""
    return path.name.split(".")[0]


def _parse(
    line: bytes, path: Path, number: int, json_key: str, domain_key: str | None
) -> tuple[str, str]:
    record: dict[str, Any] = parse_record(line, path, number)
    text = string_field(record, "--json-key", json_key, path, number)
    if domain_key is None:
        return domain_of_file(path), text
    return string_field(record, "--domain-key", domain_key, path, number), text


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Yields `(number, line)`, numbered from 1 at the part's first, without blank lines."""
    if part.end is None:
        yield from read_lines(part.path)
        return
    with part.path.open("rb") as file:
        position = part.start
        if position > 0:  # to the first line that begins here or later
            file.seek(position - 1)
            position += len(file.readline()) - 1
        number = 0
        while position < part.end and (line := file.readline()):
            number += 1
            position += len(line)
            if line.strip():
                yield number, line


def _lines_before(path: Path, offset: int) -> int:
    """Counts the lines that begin before an offset."""
    if offset == 0:
        return 0
    count = 1
    with path.open("rb") as file:
        left = offset - 1
        while left and (block := file.read(min(left, _COUNT_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count
