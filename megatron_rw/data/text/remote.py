"""Files behind URLs, through fsspec and the package that it needs for each store."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_rw.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Asked of the store at a time. s3fs would ask for 50 MB, of which a chunk of a file needs a few.
_BLOCK_BYTES = 4 << 20


def file_system(url: str, flag: str) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of a URL, and the path there.

    Raises:
        UserError: If the file system's package is missing, or none is known for the URL.
    """
    from fsspec.core import url_to_fs  # takes a tenth of a second, and most inputs are local

    with reporting(f"{flag} {url}", UserError):
        system, path = url_to_fs(url)
    return system, path


@contextmanager
def reporting(url: str, error_type: type[Exception] = OSError) -> Iterator[None]:
    """Turns the exceptions of the stores' packages into one type that names the URL."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise error_type(f"{url}: {reason}") from error


@contextmanager
def open_remote(url: str, buffering: int) -> Iterator[BinaryIO]:
    """Opens a URL with a buffer of that many bytes.

    Raises:
        OSError: If it cannot be opened or, later on, be read.
    """
    system, path = file_system(url, "--input")
    with reporting(url):
        file = system.open(path, "rb", block_size=_BLOCK_BYTES)
    with file, io.BufferedReader(_Raw(file, url), buffering) as buffered:
        yield buffered


class _Raw(io.RawIOBase):
    """A file of fsspec as a raw stream, so that `readline` has a limit and errors name the URL."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with reporting(self._url):
            return int(self._file.readinto(buffer))
