"""Writes files that are complete whenever they exist under their name."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that gets its name when all is written and on the disk.

    If writing fails, what was there under that name stays as it was. A process that is killed
    leaves `<name>.partial`, which the next one writes over; only one at a time may write.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_complete(path: Path, text: str) -> None:
    """Writes a text such that the file is complete whenever it exists, and is on the disk then."""
    with complete_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON, as `write_complete` does."""
    write_complete(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
