"""Names of domains: taken from the path of a file, and checked for use in file names."""

import re
from typing import Literal

from megatron_rw.data.text.records import BadRecordError
from megatron_rw.errors import UserError

DomainBy = Literal["corpus", "file", "directory"]

# Numbers at the end of a name, as in `part-00003`, `train-00000-of-00128`, Spark's
# `part-00003-<uuid>-c000` or `train-00000-of-00128-<hash>` of the Hugging Face hub.
_NUMBERS = re.compile(
    r"(?:(?:^|[-_])(?:(?:part|shard|chunk|split|piece|batch|segment|file)[-_]?)?\d+"
    r"(?:[-_]of[-_]\d+)?"
    r"(?:-[0-9a-f]{16}|-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:-c\d+)?)?)+$",
    re.IGNORECASE,
)
_USABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def domain_of_file(name: str, folder: str, by: DomainBy) -> str:
    """Returns the domain of a file's documents, from the names of the file and its directory.

    "file" takes the name up to the first dot, "directory" the directory, and "corpus" the name
    without the numbers at its end, which tell the shards of a corpus apart, or the directory if
    nothing else is left. It looks at the one name alone, so that each task of a job array, and a
    call that is repeated with more files, gives a file the same domain.
    """
    if by == "directory":
        return folder
    stem = name.split(".")[0]
    return stem if by == "file" else _NUMBERS.sub("", stem) or folder


def safe_domain(name: str) -> str:
    """Returns a domain's name if it can be part of a file name; a `BadRecordError` if not."""
    if not _USABLE.fullmatch(name):
        raise BadRecordError(
            "unusable domain",
            f"the domain {name[:120]!r} cannot be part of a file name here; use at most 100 "
            "letters, digits, '_', '-' and '.', and neither '-' nor '.' first",
        )
    return name


def check_domain(name: str, origin: str) -> str:
    """Returns the name of a domain that was not read from a document, if it is usable.

    Raises a `UserError` if it cannot be part of a file name; the message begins with `origin`.
    """
    try:
        return safe_domain(name)
    except BadRecordError as error:
        raise UserError(f"{origin}: {error}") from error
