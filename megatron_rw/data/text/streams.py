"""Opens files for reading: local ones, URLs, standard input; plain, compressed or Parquet.

What goes wrong while such a file is read is an error that names the file, whichever library reads.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from megatron_rw.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STANDARD_INPUT = "-"
Compression = Literal["gzip", "zstd"]

_BUFFER = 1 << 20
# Asked of the store at a time. s3fs would ask for 50 MB, of which a chunk of a file needs a few.
_BLOCK_BYTES = 4 << 20


@contextmanager
def open_stream(path: str, compression: Compression | None) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yields the uncompressed bytes, and the stored ones, whose position tells the progress.

    Raises a `UserError` if the file is cut off or damaged, where it is read. Raises an `OSError` if
    it cannot be opened or read.
    """
    with _open_stored(path) as stored:
        if compression is None:
            yield stored, stored
            return
        if compression == "gzip":
            content: Any = gzip.GzipFile(fileobj=stored)
            errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
        else:
            zstd = _zstd(path)
            content, errors = zstd.ZstdFile(stored), (EOFError, zstd.ZstdError)
        raw = _Raw(content, partial(_reporting_damage, path, compression, errors))
        yield io.BufferedReader(raw, _BUFFER), stored


def damage(path: str, what: str, error: Exception) -> UserError:
    """Returns the error for a file that cannot be read to its end."""
    return UserError(f"{path}: damaged {what} ({' '.join(str(error).split())}); copy it again")


@contextmanager
def package_of(path: str, name: str) -> Iterator[None]:
    """Refuses a file if the body cannot import the package that reads it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: reading it needs a package; run: pip install {name}") from error


def parquet_file(path: str, stream: BinaryIO) -> Any:
    """Opens a Parquet file; a `UserError` if it is none, or the package is missing."""
    with package_of(path, "pyarrow"):
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    try:
        return ParquetFile(stream)
    except (ArrowException, OSError) as error:
        raise damage(path, "parquet data", error) from error


def file_system(url: str, flag: str) -> tuple["AbstractFileSystem", str]:
    """Returns the file system of a URL, and the path there.

    Raises a `UserError` if the file system's package is missing, or none is known for the URL.
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
def _reporting_damage(path: str, what: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise damage(path, f"{what} data", error) from error


def _open_stored(path: str) -> AbstractContextManager[BinaryIO]:
    if path == STANDARD_INPUT:
        return nullcontext(sys.stdin.buffer)
    return _open_remote(path) if "://" in path else open(path, "rb", buffering=_BUFFER)


@contextmanager
def _open_remote(url: str) -> Iterator[BinaryIO]:
    system, path = file_system(url, "--input")
    with reporting(url):
        file = system.open(path, "rb", block_size=_BLOCK_BYTES)
    raw = _Raw(file, partial(reporting, url))
    with file, io.BufferedReader(raw, _BUFFER) as buffered:
        yield buffered


def _zstd(path: str) -> Any:
    with package_of(path, "backports.zstd"):
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    return zstd


class _Raw(io.RawIOBase):
    """A library's file as a raw stream, so that `readline` has a limit and errors name the file."""

    def __init__(
        self, file: Any, reporting_errors: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._file = file
        self._reporting = reporting_errors

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with self._reporting():
            return int(self._file.readinto(buffer))
