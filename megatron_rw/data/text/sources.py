"""Which files a tool reads: from paths, directories, patterns, URLs and standard input."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from megatron_rw.data.text.domain_names import DomainBy, domain_of_file
from megatron_rw.data.text.remote import file_system, open_remote, reporting
from megatron_rw.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STANDARD_INPUT = "-"
Format = Literal["jsonl", "json", "parquet", "txt"]
Compression = Literal["gzip", "zstd"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "txt",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
READS = ".jsonl, .json, .txt (each also with .gz or .zst) and .parquet"
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file of documents.

    Attributes:
        path: A local path, a URL, or `-`.
        size: Bytes as stored; 0 for standard input.
        version: Changes when the content does: the time of change, or a store's own mark.
    """

    path: str
    format: Format
    compression: Compression | None
    size: int
    version: str

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def folder(self) -> str:
        """Name of the directory that it is in."""
        path = self.path if "://" in self.path else os.path.abspath(self.path)
        return path.rpartition("/")[0].rpartition("/")[2]

    def domain(self, by: DomainBy) -> str:
        """Returns the domain of its documents where no field holds it, as `--domain-by` says."""
        if self.path == STANDARD_INPUT:
            return "stdin"
        return domain_of_file(self.name, self.folder, by)

    @property
    def text_bytes(self) -> int:
        """About how many bytes reading it gives, where compression is taken to save 3 of 4."""
        return self.size * (4 if self.compression else 1)

    @property
    def key(self) -> str:
        """32 hexadecimal digits that name this version of this file."""
        identity = "\0".join((self.path, str(self.size), self.version))
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def find_sources(inputs: Sequence[str], flag: str = "--input") -> list[Source]:
    """Finds the files that a flag names, before any work.

    Args:
        inputs: Paths of files, of directories (searched through, hidden files left out), patterns
            with `*`, `?` or `[`, URLs of fsspec (`s3://...`) of any of these, or `-` for JSON lines
            on standard input.
        flag: The flag, for messages.

    Returns:
        The files in the order given; those of a directory or a pattern sorted by path.

    Raises:
        UserError: If nothing is found for one of them, a file's format is not read, or a file is
            named twice.
    """
    found = [source for name in inputs for source in _find(name, flag)]
    for path, count in Counter(source.path for source in found).items():
        if count > 1:
            raise UserError(f"{flag} {path}: given {count} times; name it once")
    return found


@contextmanager
def open_source(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a source.

    Yields:
        The uncompressed bytes, and the stored ones beneath, whose position tells the progress.
    """
    with _open_stored(source.path) as stored:
        if source.compression == "gzip":
            content: Any = gzip.GzipFile(fileobj=stored)
        elif source.compression == "zstd":
            content = _zstd(source).ZstdFile(stored)
        else:
            content = stored
        yield content, stored


def damage(source: Source, line: int, error: Exception) -> UserError:
    """Returns the error for a file that cannot be read to its end."""
    what = f"{source.compression or source.format} data"
    why = " ".join(str(error).split())
    return UserError(f"{source.path}: damaged {what} after line {line} ({why}); copy it again")


def damage_errors(source: Source) -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading a source raises if it is cut off or damaged."""
    if source.compression == "zstd":
        return (EOFError, _zstd(source).ZstdError)
    import zlib

    return (EOFError, gzip.BadGzipFile, zlib.error)


def parquet_file(source: Source, stream: BinaryIO) -> Any:
    """Opens a Parquet file.

    Raises:
        UserError: If it is none, or the package is missing.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            f"{source.path}: reading it needs a package; run: pip install pyarrow"
        ) from error
    try:
        return ParquetFile(stream)
    except (ArrowException, OSError) as error:
        raise damage(source, 0, error) from error


def _zstd(source: Source) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UserError(
            f"{source.path}: reading it needs a package; run: pip install backports.zstd"
        ) from error
    return zstd


def _find(name: str, flag: str) -> list[Source]:
    if name == STANDARD_INPUT:
        return [Source(STANDARD_INPUT, "jsonl", None, 0, "")]
    if "://" in name:
        return _find_remote(name, flag)
    path = Path(name)
    if path.is_dir():
        inside = sorted(
            str(file)
            for file in path.rglob("*")
            if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
        )
        return [_local(file, flag) for file in _readable(inside, name, flag)]
    if path.is_file():
        return [_local(name, flag)]
    if glob.has_magic(name):
        matches = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        if matches:
            return [_local(file, flag) for file in _readable(matches, name, flag)]
        raise UserError(f"{flag} {name}: no file matches")
    raise UserError(f"{flag} {name}: no such file")


def _readable(paths: list[str], name: str, flag: str) -> list[str]:
    known = [path for path in paths if _kind(path) is not None]
    if not known:
        held = ", ".join(sorted({os.path.splitext(path)[1] or "(none)" for path in paths}))
        raise UserError(
            f"{flag} {name}: no file to read in it; it has the suffixes: {held or 'no files'}; "
            f"{READS} are read"
        )
    return known


def _kind(path: str) -> tuple[Format, Compression | None] | None:
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    format_ = _FORMATS.get(suffix)
    if format_ is None or (format_ == "parquet" and compression):
        return None
    return format_, compression


def _source(path: str, flag: str, size: int, version: str) -> Source:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{flag} {path}: only {READS} are read; convert it, or rename it")
    return Source(path, *kind, size, version)


def _local(path: str, flag: str) -> Source:
    with open(path, "rb") as file:  # so that an unreadable file is refused at the start
        status = os.fstat(file.fileno())
    return _source(path, flag, status.st_size, str(status.st_mtime_ns))


def _find_remote(url: str, flag: str) -> list[Source]:
    system, path = file_system(url, flag)
    with reporting(f"{flag} {url}", UserError):
        if glob.has_magic(path):
            paths = sorted(system.glob(path))
            if not paths:
                raise UserError(f"{flag} {url}: no file matches")
            paths = _readable(paths, url, flag)
        elif system.isdir(path):
            paths = _readable(sorted(system.find(path)), url, flag)
        elif system.exists(path):
            paths = [path]
        else:
            raise UserError(f"{flag} {url}: no such file")
        return [_remote(system, path, flag) for path in paths]


def _remote(system: AbstractFileSystem, path: str, flag: str) -> Source:
    info = system.info(path)
    marks = (info.get(mark) for mark in ("ETag", "etag", "mtime", "LastModified", "updated"))
    version = next((str(mark) for mark in marks if mark is not None), "")
    return _source(system.unstrip_protocol(path), flag, int(info["size"] or 0), version)


@contextmanager
def _open_stored(path: str) -> Iterator[BinaryIO]:
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    if "://" in path:
        with open_remote(path, _BUFFER) as file:
            yield file
        return
    with open(path, "rb", buffering=_BUFFER) as file:
        yield file
