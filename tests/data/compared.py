"""What is wrong with the files of preprocess_data, beside those of an undisturbed call."""

from __future__ import annotations

from pathlib import Path

from megatron_rw.data.indexed.domains import FILE_NAME, DomainsFile
from megatron_rw.data.resume import FOLDER


def incomplete(expected: Path, found: Path) -> str | None:
    """What is wrong with the files of a directory that have their final names, if anything is."""
    for path in sorted(found.rglob("*")):
        relative = path.relative_to(found)
        if path.suffix in (".bin", ".idx") and FOLDER not in relative.parts:
            if path.read_bytes() != (expected / relative).read_bytes():
                return f"{relative} is not that of the undisturbed run"
        elif path.name == FILE_NAME:
            for record in DomainsFile.load(path).domains.values():
                for suffix in (".bin", ".idx"):
                    if not path.with_name(record.prefix + suffix).exists():
                        return f"{relative} lists {record.prefix}{suffix}, which is not there"
    return None


def differences(expected: Path, found: Path) -> str | None:
    """The first file that is in one directory alone, or not the same; hidden ones included."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (expected, found)
    ]
    for name in sorted(names[0] ^ names[1]):
        return f"{name} is {'missing' if name in names[0] else 'left behind'}"
    for name in sorted(names[0]):
        if (expected / name).read_bytes() != (found / name).read_bytes():
            return f"{name} differs"
    return None
