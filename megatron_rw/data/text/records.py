"""From a line to the fields of a document, or to the reason why it is no document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

# Longer than any line worth training on, and small enough to hold a few times over.
MAX_LINE_BYTES = 128 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXCERPT = 200
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True)
class Reject:
    """A line that is no document.

    Attributes:
        line: its number in the file, from 1; of Parquet the row, of a JSON array the element.
        kind: one of a few words, to count by.
        reason: what is wrong with it.
        excerpt: how it begins.
    """

    line: int
    kind: str
    reason: str
    excerpt: str


class BadRecordError(Exception):
    """A line is no document.

    Args:
        kind: as in `Reject`.
        reason: as in `Reject`.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Raw:
    """A document as it stands in its file, still to be parsed.

    Attributes:
        line: its number, from 1 at the start of the chunk or of the file; the reader says which.
        content: a line without its end, or the fields themselves.
        size: 0; bytes of the line if it is too long, of which `content` is then the start.
    """

    line: int
    content: bytes | dict[str, Any]
    size: int

    def excerpt(self) -> str:
        """How it begins, for a message."""
        if isinstance(self.content, bytes):
            return self.content[:_EXCERPT].decode("utf-8", errors="replace").rstrip("\r\n")
        return repr(self.content)[:_EXCERPT]


class LineReader:
    """Reads lines from a stream without holding one that is too long.

    Args:
        stream: at the start of a line.
        limit: bytes of a line, without its end, of which longer ones are only skipped.
        position: what the position of the stream is called.

    Attributes:
        position: offset of the next line.
        lines: number of lines that the last call of `until` read, blank ones included.
        total: number of lines that all calls read.
        ended: whether the stream is at its end.
    """

    def __init__(self, stream: BinaryIO, limit: int, position: int = 0) -> None:
        self._stream = stream
        self._limit = limit
        self.position = position
        self.lines = 0
        self.total = 0
        self.ended = False

    def until(self, end: int | None) -> Iterator[Raw]:
        """Yields the lines that begin before `end`, counted from 1, without blank ones.

        Args:
            end: an offset; None reads to the end of the stream.
        """
        self.lines = 0
        while not self.ended and (end is None or self.position < end):
            # With room for "\r\n" at the end of the longest.
            line = self._stream.readline(self._limit + 2)
            if not line:
                self.ended = True
                return
            self.lines += 1
            self.total += 1
            size = len(line)
            cut = size == self._limit + 2 and not line.endswith(b"\n")
            if cut or (size > self._limit and len(line.rstrip(b"\r\n")) > self._limit):
                size += self._skip() if cut else 0
                yield Raw(self.lines, line[:_EXCERPT], size)
            else:
                if self.position == 0:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line and not line.isspace():
                    yield Raw(self.lines, line.rstrip(b"\r\n"), 0)
            self.position += size

    def _skip(self) -> int:
        skipped = 0
        while piece := self._stream.readline(_SKIP_BYTES):
            skipped += len(piece)
            if piece.endswith(b"\n"):
                break
        return skipped


def seek_line(stream: BinaryIO, start: int, end: int) -> int | None:
    """Moves a stream to the first line that begins in `[start, end)`.

    Args:
        stream: one that can seek.
        start: an offset in bytes.
        end: an offset in bytes.

    Returns:
        The offset of that line; None if none begins there.
    """
    if start == 0:
        stream.seek(0)
        return 0
    position = start - 1
    stream.seek(position)
    while position < end - 1:
        piece = stream.readline(min(_SKIP_BYTES, end - 1 - position))
        if not piece:
            return None
        position += len(piece)
        if piece.endswith(b"\n"):
            return position
    return None


def parse(raw: Raw, limit: int, text_key: str | None = None) -> dict[str, Any]:
    """Returns the fields of a document.

    Args:
        raw: the document.
        limit: bytes that a line may have.
        text_key: the field that plain text is given out as; None of lines of JSON.

    Raises:
        BadRecordError: it is too long, or not what it should be in UTF-8.
    """
    if isinstance(raw.content, dict):
        return raw.content
    if raw.size:
        raise BadRecordError(
            "too long", f"{raw.size:,} bytes, above --max-line-bytes {limit}; split the document"
        )
    try:
        text = raw.content.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError("not UTF-8", f"{error.reason} at byte {error.start}") from error
    if text_key is not None:
        return {text_key: text}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError("invalid JSON", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecordError(
            "not an object", f'{json_type(record)}, where a line must be like {{"text": "..."}}'
        )
    return record


def text_field(record: dict[str, Any], flag: str, key: str) -> str:
    """Returns the text that a document holds under `key`.

    Args:
        record: the document's fields.
        flag: the flag that chose the key, for the message.
        key: the field.

    Raises:
        BadRecordError: it is missing, not a string, empty, or holds what is not text.
    """
    value = record.get(key, record)
    if value is record:
        raise BadRecordError(
            "missing key",
            f"no field '{key}' ({flag}); it has: {', '.join(sorted(record)) or 'none'}"[:_EXCERPT],
        )
    if not isinstance(value, str):
        raise BadRecordError(
            "not a string", f"field '{key}' ({flag}) is {json_type(value)}, not a string"
        )
    if not value:
        raise BadRecordError("empty text", f"field '{key}' ({flag}) is empty")
    if "\0" in value:
        at = value.index("\0")
        raise BadRecordError("NUL", f"field '{key}' ({flag}) holds a NUL at character {at}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRecordError(
                "half a surrogate pair",
                f"field '{key}' ({flag}) holds half of a surrogate pair at character "
                f"{error.start}, which is not text",
            ) from error
    return value


def json_type(value: object) -> str:
    """What JSON calls the type of a value."""
    return _JSON_TYPES.get(type(value), f"a {type(value).__name__}")


_JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}
