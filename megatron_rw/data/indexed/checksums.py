"""SHA-256 of datasets, in the format of `sha256sum`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_rw.data.progress import Progress
from megatron_rw.errors import UserError

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_BLOCK = 1 << 22


def checksums(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yields each file and its digest in hexadecimal, as soon as it is read."""
    paths = list(paths)
    progress = Progress("inspect_dataset: reading", sum(path.stat().st_size for path in paths))
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                progress.advance(len(block))
        yield path, digest.hexdigest()


def read_checksums(path: Path) -> dict[str, str]:
    """Reads what `--checksum` or `sha256sum` printed.

    Returns:
        Path, as printed, to digest.

    Raises:
        UserError: If it is something else.
    """
    found = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--verify {path}: is not text; give what --checksum printed") from error
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"--verify {path}, line {number}: not '<sha256>  <path>'; give what --checksum "
                "printed"
            )
        found[match[2]] = match[1]
    return found


def expected(path: Path, listed: dict[str, str]) -> str:
    """Returns the digest that a file ought to have, which is listed by its path or its name.

    Raises:
        UserError: If neither is listed, or several files of this name are.
    """
    if str(path) in listed:
        return listed[str(path)]
    # A copy of the dataset has another path and the same name.
    same = {digest for other, digest in listed.items() if Path(other).name == path.name}
    if len(same) != 1:
        raise UserError(
            f"--verify: lists {'no' if not same else 'several'} {path.name}; "
            "give what --checksum printed of this dataset"
        )
    return same.pop()
