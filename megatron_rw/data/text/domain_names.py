"""Names of domains: taken from the path of a file, and checked for use in file names."""

import re
from collections.abc import Collection
from typing import Literal

from megatron_rw.data.text.records import BadRecordError
from megatron_rw.errors import UserError

DomainBy = Literal["corpus", "file", "directory"]

# A number at the end of a name, as in `part-00003`, `train-00000-of-00128`, Spark's
# `part-00003-<uuid>-c000` or `train-00000-of-00128-<hash>` of the Hugging Face hub.
_NUMBER = re.compile(
    r"(?:^|[-_])(?P<word>(?:part|shard|chunk|split|piece|batch|segment|file)[-_]?)?(?P<number>\d+)"
    r"(?P<suffix>[-_]of[-_]\d+)?"
    r"(?P<hash>-[0-9a-f]{16}|-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:-c\d+)?)?$",
    re.IGNORECASE,
)
# Years, months and days, such as 2023, 202301 and 20230131.
_DATE = re.compile(r"(?:19|20)\d\d(?:(?:0[1-9]|1[0-2])(?:[0-3]\d)?)?")
_SHORTEST_SHARD_NUMBER = 3
_USABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def domain_of_file(name: str, folder: str, by: DomainBy) -> str:
    """Returns the domain of a file's documents, from the names of the file and its directory.

    "file" takes the name up to the first dot, "directory" the directory, and "corpus" the name
    without the number that tells a shard of a corpus from the others, or the directory if nothing
    else is left.

    It looks at the one name alone, so that each task of a job array, and a call that is repeated
    with more files, gives a file the same domain. A number is a shard's if a word such as `part` is
    before it, if `of` and the number of shards follow, if the name is nothing else, or if it has
    three digits or more and is no date: not those of `news-20230131`, `cc-2019-35` and `wiki-2`.
    """
    if by == "directory":
        return folder
    stem = name.split(".")[0]
    if by == "file":
        return stem
    while found := _NUMBER.search(stem):
        rest, number = stem[: found.start()], found["number"]
        marked = found["word"] or found["suffix"] or found["hash"]
        short = rest and len(number) < _SHORTEST_SHARD_NUMBER
        if not marked and (short or _DATE.fullmatch(number)):
            break
        stem = rest
    return stem or folder


def check_numbered(names: Collection[str]) -> None:
    """Refuses domains of which one has the name of another and a number.

    They are probably one corpus, some of whose shard numbers look like years or have one or two
    digits. Raises a `UserError` if there are such names.
    """
    for name in names:
        found = _NUMBER.search(name)
        rest = name[: found.start()] if found else ""
        if rest and rest in names:
            raise UserError(
                f"--domain-by corpus: the files give both the domain '{rest}' and the domain "
                f"'{name}'. If they are one corpus, give --domain {rest} or --domain-by directory; "
                "if each file is a domain, give --domain-by file"
            )


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
