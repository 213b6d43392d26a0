"""Reading JSON-lines text: one JSON object a line, plain (`.jsonl`) or gzip (`.jsonl.gz`).

Every error is an `InputError` that names the file, the line (from 1) and the remedy.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_rw.data.command import InputError

SUFFIXES = (".jsonl", ".jsonl.gz")


def check_inputs(paths: Sequence[Path]) -> None:
    """Checks that every `--input` is a readable file of a known format, before any work.

    Raises:
        InputError: For the first that is not.
    """
    for path in paths:
        if not path.is_file():
            raise InputError(f"--input {path}: no such file")
        if not path.name.endswith(SUFFIXES):
            raise InputError(
                f"--input {path}: only {' and '.join(SUFFIXES)} are read; "
                "convert it to JSON lines, one object a line"
            )
        with path.open("rb"):
            pass


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields `(line number, line)` of a JSON-lines file, in order, without blank lines.

    Raises:
        InputError: If a gzip file is truncated or damaged, or if no line has anything in it.
    """
    number = 0
    found = False
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found = True
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: damaged gzip data after line {number} ({error}); copy the file again"
        ) from error
    if not found:
        raise InputError(f"{path}: no documents; leave the file out of --input")


def parse_record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Parses one line as a JSON object.

    Args:
        line: The raw line.
        path: Its file, for the message.
        number: Its number from 1, for the message.

    Raises:
        InputError: If it is not UTF-8, not JSON or not an object.
    """
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); "
            "convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, line {number}: invalid JSON ({error}); correct or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            f"{path}, line {number}: {_json_type(record)}, not an object; "
            'each line must be like {"text": "..."}'
        )
    return record


def string_field(record: dict[str, Any], flag: str, key: str, path: Path, number: int) -> str:
    """Returns the non-empty string that a record holds under `key`.

    Args:
        record: The parsed line.
        flag: The flag that chose the key, for the message.
        key: The field.
        path: The record's file, for the message.
        number: The record's line from 1, for the message.

    Raises:
        InputError: If the field is missing, not a string, empty, or not valid Unicode.
    """
    if key not in record:
        raise InputError(
            f"{path}, line {number}: no field '{key}' ({flag}); "
            f"the line has: {', '.join(sorted(record)) or 'none'}"
        )
    value = record[key]
    if not isinstance(value, str):
        raise InputError(
            f"{path}, line {number}: field '{key}' ({flag}) is {_json_type(value)}, "
            "not a string; correct or remove the line"
        )
    if not value:
        raise InputError(f"{path}, line {number}: field '{key}' ({flag}) is empty; remove the line")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}, line {number}: field '{key}' ({flag}) holds half of a surrogate pair at "
                f"character {error.start}, which is not text; correct or remove the line"
            ) from error
    return value


def _json_type(value: object) -> str:
    return _JSON_TYPES[type(value)]


_JSON_TYPES: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def read_texts(paths: Sequence[Path], key: str) -> Iterator[str]:
    """Yields the text of every document of some files, in order.

    Raises:
        InputError: At the first bad line.
    """
    for path in paths:
        for number, line in read_lines(path):
            yield string_field(parse_record(line, path, number), "--json-key", key, path, number)
