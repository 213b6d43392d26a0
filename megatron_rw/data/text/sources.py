"""Which files a tool reads: from paths, directories, patterns, URLs and standard input."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import arg

from megatron_rw.data.text.domain_names import DomainBy, check_domain, domain_of_file
from megatron_rw.data.text.streams import STANDARD_INPUT, Compression, file_system, reporting
from megatron_rw.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Format = Literal["jsonl", "json", "parquet", "txt"]

_FORMATS: tuple[Format, ...] = ("jsonl", "json", "txt")
_COMPRESSIONS: dict[str, Compression | None] = {"": None, ".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, tuple[Format, Compression | None]] = {
    f".{name}{ending}": (name, compression)
    for name in _FORMATS
    for ending, compression in _COMPRESSIONS.items()
} | {".parquet": ("parquet", None)}
READS = ".jsonl, .json, .txt (each also with .gz or .zst) and .parquet"


@dataclass(frozen=True)
class Source:
    """A file of documents."""

    path: str  # A local path, a URL, or `-`.
    format: Format
    compression: Compression | None
    size: int  # Bytes as stored; 0 for standard input.
    version: str  # Changes when the content does: the time of change, or a store's own mark.

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.path.rstrip("/").rpartition("/")[2]

    def domain(self, by: DomainBy) -> str:
        """Returns the domain of its documents where no field holds it, as `--domain-by` says."""
        if self.path == STANDARD_INPUT:
            return "stdin"
        path = self.path if "://" in self.path else os.path.abspath(self.path)
        folder = path.rpartition("/")[0].rpartition("/")[2]
        return domain_of_file(self.name, folder, by)

    @property
    def text_bytes(self) -> int:
        """About how many bytes reading it gives, where compression is taken to save 3 of 4."""
        return self.size * (4 if self.compression else 1)

    @property
    def key(self) -> str:
        """32 hexadecimal digits that name this version of this file."""
        identity = "\0".join((self.path, str(self.size), self.version))
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


# At most one of the flags that name domains may be given.
ONE_DOMAIN_FLAG = tyro.conf.create_mutex_group(required=False)


@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """Input."""

    input: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]")]
    """Files, directories, patterns, URLs that fsspec opens, or - for JSON lines on standard input.
    Formats: .jsonl, .json, .txt (each also with .gz or .zst) and .parquet."""

    domain_key: Annotated[str | None, ONE_DOMAIN_FLAG, arg(metavar="KEY")] = None
    """Field or column that holds the document's domain."""

    domain_by: Annotated[DomainBy, ONE_DOMAIN_FLAG] = "corpus"
    """Without --domain-key, the domain comes from the path of the file. "corpus" takes the file's
    name up to the first dot, without the numbers at its end: part-00000.jsonl and its like belong
    to the domain named by their directory, train-00000-of-00128.parquet to "train", web-0001.jsonl
    to "web". "file" keeps the numbers. "directory" takes the name of the directory."""

    def __post_init__(self) -> None:
        if not self.input:
            raise UserError("--input: give at least one file")

    def domain_of(self, source: Source) -> str:
        """Returns the domain of a source's documents where no field holds it.

        Raises a `UserError` if its name cannot be part of a file name.
        """
        remedy = "give --domain-by or --domain, or rename it"
        return check_domain(source.domain(self.domain_by), f"{source.path}: {remedy}")


def find_sources(inputs: Sequence[str], flag: str = "--input") -> list[Source]:
    """Finds the files that a flag names, before any work.

    They are paths of files, of directories (searched through, hidden files left out), patterns with
    `*`, `?` or `[`, URLs of fsspec (`s3://...`) of any of these, or `-` for JSON lines on standard
    input. The files come in the order given; those of a directory or a pattern sorted by path.
    Raises a `UserError` if nothing is found for one of them, a file's format is not read, or a file
    is named twice.
    """
    found = [source for name in inputs for source in _find(name, flag)]
    for path, count in Counter(source.path for source in found).items():
        if count > 1:
            raise UserError(f"{flag} {path}: given {count} times; name it once")
    return found


def shard_of(sources: Sequence[Source], flag: str | None) -> list[Source]:
    """Returns a shard's sources, which are consecutive, so that merged shards equal one run.

    `sources` are all inputs, the same in every task of a job array, and `flag` says which share to
    take, as `--shard` has it; None takes all. There is at least one source in each shard, and the
    shards' bytes are as even as whole files allow. Raises a `UserError` if there are fewer files
    than shards, or standard input is among them.
    """
    if flag is None:
        return list(sources)
    index, count = parse_shard(flag)
    if any(source.path == STANDARD_INPUT for source in sources):
        raise UserError("--shard: standard input cannot be shared; give files")
    if len(sources) < count:
        raise UserError(
            f"--shard {flag}: there are {len(sources)} files, and a file is "
            "the least that a shard takes; use fewer shards, or split the files"
        )
    bounds = _bounds([source.size for source in sources], count)
    return list(sources[bounds[index] : bounds[index + 1]])


def parse_shard(flag: str) -> tuple[int, int]:
    """Returns the number of a shard, from 0, and the number of shards, as `--shard 0/8` says them.

    Any other form, or a shard's number that is not below the other, is a `UserError`.
    """
    index, _, count = flag.partition("/")
    if not index.isdecimal() or not count.isdecimal():
        raise UserError(f"--shard {flag}: give it like 0/8")
    if int(index) >= int(count):
        raise UserError(
            f"--shard {flag}: shards count from 0, so the last is {int(count) - 1}/{count}"
        )
    return int(index), int(count)


def _bounds(sizes: Sequence[int], count: int) -> list[int]:
    """Cuts a list into `count` runs, none empty, of about the same sum."""
    total = sum(sizes)
    bounds = [0]
    seen = 0
    for position, size in enumerate(sizes):
        left = count - len(bounds)
        if left == 0:
            break
        if position > bounds[-1]:
            # A file whose middle is beyond the share belongs to the next shard.
            beyond = (2 * seen + size) * count >= 2 * total * len(bounds)
            if beyond or len(sizes) - position == left:
                bounds.append(position)
        seen += size
    return [*bounds, len(sizes)]


def _find(name: str, flag: str) -> list[Source]:
    if name == STANDARD_INPUT:
        return [Source(STANDARD_INPUT, "jsonl", None, 0, "")]
    if "://" in name:
        return _find_remote(name, flag)
    path = Path(name)
    if path.is_file():
        return [_local(name, flag)]
    if path.is_dir():
        found = [
            str(file)
            for file in path.rglob("*")
            if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
        ]
    elif not glob.has_magic(name):
        raise UserError(f"{flag} {name}: no such file")
    else:
        found = [file for file in glob.glob(name, recursive=True) if os.path.isfile(file)]
        if not found:
            raise UserError(f"{flag} {name}: no file matches")
    return [_local(file, flag) for file in _readable(sorted(found), name, flag)]


def _readable(paths: list[str], name: str, flag: str) -> list[str]:
    known = [path for path in paths if _kind(path) is not None]
    if not known:
        held = ", ".join(sorted({os.path.splitext(path)[1] or "(none)" for path in paths}))
        raise UserError(
            f"{flag} {name}: no file to read in it; the suffixes there: {held or 'none'}; give a "
            f"folder with {READS}"
        )
    return known


def _kind(path: str) -> tuple[Format, Compression | None] | None:
    return next((kind for suffix, kind in _KINDS.items() if path.endswith(suffix)), None)


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


def _remote(system: "AbstractFileSystem", path: str, flag: str) -> Source:
    info = system.info(path)
    marks = (info.get(mark) for mark in ("ETag", "etag", "mtime", "LastModified", "updated"))
    version = next((str(mark) for mark in marks if mark is not None), "")
    return _source(system.unstrip_protocol(path), flag, int(info["size"] or 0), version)
