"""From a line to the fields of a document, or to the reason why it is no document."""

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

# Longer than any line worth training on, and small enough for several of them to fit into memory.
MAX_LINE_BYTES = 128 << 20
# A verdict on the share of bad lines is not given on fewer lines, except at the end.
_EARLIEST_VERDICT = 10_000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXCERPT = 200
_SKIP_BYTES = 1 << 20


class BadRecordError(Exception):
    """A line is no document; `kind` is a few words to count such lines by."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Raw:
    """A document as it stands in its file, still to be parsed."""

    # The number of the line, the row of Parquet or the element of JSON, from 1 in each chunk.
    line: int
    content: bytes | dict[str, Any]  # A line without its end, or the fields themselves.
    size: int  # 0, or the bytes of a line that is too long, of which `content` is then the start.

    def excerpt(self) -> str:
        """Returns how it begins, for a message."""
        if isinstance(self.content, bytes):
            return self.content[:_EXCERPT].decode("utf-8", errors="replace").rstrip("\r\n")
        return repr(self.content)[:_EXCERPT]


class LineReader:
    """Reads lines from a stream without holding one that is too long.

    `limit` are the most bytes that a line may have, without its end. `position` is the offset of
    the next line in the file. `lines` are those that the last call of `until` read, blank ones
    included.
    """

    def __init__(self, stream: BinaryIO, limit: int, position: int = 0) -> None:
        self._stream = stream
        self._limit = limit
        self.position = position
        self.lines = 0
        self.ended = False

    def until(self, end: int) -> Iterator[Raw]:
        """Yields the lines that begin before `end`, counted from 1, without blank ones."""
        self.lines = 0
        while not self.ended and self.position < end:
            # The longest line that is taken may have "\r\n" behind it.
            line = self._stream.readline(self._limit + 2)
            if not line:
                self.ended = True
                return
            self.lines += 1
            size = len(line)
            cut = size == self._limit + 2 and not line.endswith(b"\n")
            if cut or (size > self._limit and len(line.rstrip(b"\r\n")) > self._limit):
                while cut and (piece := self._stream.readline(_SKIP_BYTES)):
                    size += len(piece)
                    cut = not piece.endswith(b"\n")
                yield Raw(self.lines, line[:_EXCERPT], size)
            else:
                if self.position == 0:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line and not line.isspace():
                    yield Raw(self.lines, line.rstrip(b"\r\n"), 0)
            self.position += size


def seek_line(stream: BinaryIO, start: int, end: int) -> int | None:
    """Moves a stream to the first line that begins in `[start, end)`, and returns its offset.

    It returns None if no line begins there.
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


def too_many_bad(bad: int, taken: int, allowed: float, at_end: bool) -> bool:
    """Tells whether the share of bad lines, beside those taken, is above `--max-bad-fraction`.

    Before all lines are counted, `at_end`, a few bad lines decide nothing.
    """
    taken = taken if at_end else max(taken, _EARLIEST_VERDICT)
    return bad > allowed * (bad + taken)


def parse(raw: Raw, limit: int, text_key: str | None = None) -> dict[str, Any]:
    """Returns the fields of a document.

    `limit` are the most bytes that a line may have, for the message. `text_key` is the field that
    plain text becomes; None if the line is JSON. Raises a `BadRecordError` if it is too long, not
    UTF-8, or no JSON object.
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
            "not an object", f'{reprlib.repr(record)}, where a line must be like {{"text": "..."}}'
        )
    return record


def text_field(record: dict[str, Any], flag: str, key: str) -> str:
    """Returns the text that a document holds under the key that a flag chose.

    Raises a `BadRecordError` if it is missing, not a string, empty, or holds what is not text.
    """
    if key not in record:
        raise BadRecordError(
            "missing key",
            f"no field '{key}' ({flag}); it has: {', '.join(sorted(record)) or 'none'}"[:_EXCERPT],
        )
    field, value = f"field '{key}' ({flag})", record[key]
    if not isinstance(value, str):
        raise BadRecordError("not a string", f"{field} is {reprlib.repr(value)}, not a string")
    if not value:
        raise BadRecordError("empty text", f"{field} is empty")
    if "\0" in value:
        at = value.index("\0")
        raise BadRecordError("NUL", f"{field} holds a NUL at character {at}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            "half a surrogate pair",
            f"{field} holds half of a surrogate pair at character {error.start}, which is not text",
        ) from error
    return value
