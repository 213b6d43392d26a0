"""A directory of finished datasets: one per domain, `domains.json` and `blend.txt`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.blend import BLEND_FILE, blend_text
from megatron_rw.errors import UserError
from megatron_rw.platform.files import write_complete


def check_output_dir(output_dir: Path, overwrite: bool) -> Path:
    """Returns the absolute path of a directory into which datasets may be put.

    Args:
        output_dir: As given by `--output-dir`; it need not exist.
        overwrite: Whether datasets that it holds may be replaced.

    Raises:
        UserError: If they may not, or their `domains.json` is malformed.
    """
    absolute = output_dir.absolute()
    if any(character.isspace() for character in str(absolute)):
        raise UserError(
            f"--output-dir {absolute}: Megatron splits {BLEND_FILE} at white space; "
            "give a path without any"
        )
    there = [name for name in (domains.FILE_NAME, BLEND_FILE) if (absolute / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"--output-dir {output_dir}: holds datasets already ({there[0]}); give another "
            "directory, or --overwrite to replace them"
        )
    _listed_files(absolute / domains.FILE_NAME)  # a malformed one is told of before the work
    return absolute


def publish(
    scratch: Path,
    output_dir: Path,
    records: Mapping[str, domains.DomainRecord],
    weights: Mapping[str, float],
    tokenizer: domains.TokenizerRecord | None,
) -> None:
    """Moves finished datasets to their names, `domains.json` last.

    That file goes first when datasets are replaced: while it is there, what it says is true.

    Args:
        scratch: Directory of the `.bin/.idx` files and nothing else, on the same file system.
        output_dir: Absolute path of where they belong; it exists.
        records: Domain to what is in it.
        weights: Domain to its weight in the blend.
        tokenizer: What made the token ids; None, if it is not known, writes no `domains.json`.
    """
    manifest, blend = output_dir / domains.FILE_NAME, output_dir / BLEND_FILE
    stale = _listed_files(manifest)
    manifest.unlink(missing_ok=True)
    blend.unlink(missing_ok=True)
    for file in sorted(scratch.iterdir()):
        stale.discard(file.name)
        file.replace(output_dir / file.name)
    for name in stale:
        (output_dir / name).unlink(missing_ok=True)

    prefixes = {name: output_dir / record.prefix for name, record in records.items()}
    write_complete(blend, blend_text(weights, prefixes))
    if tokenizer is not None:
        domains.DomainsFile(tokenizer=tokenizer, domains=records).save(manifest)


def _listed_files(manifest: Path) -> set[str]:
    if not manifest.exists():
        return set()
    try:
        listed = domains.DomainsFile.load(manifest).domains.values()
    except ValueError as error:
        raise UserError(str(error)) from error
    return {f"{record.prefix}{suffix}" for record in listed for suffix in (".bin", ".idx")}


def check_space(directory: Path, size: int) -> None:
    """See that a directory's disk has room.

    Args:
        directory: It exists.
        size: What will be written, in bytes.

    Raises:
        UserError: If it has not.
    """
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(
            f"{directory}: {free / 1e9:,.1f} GB are free, and {size / 1e9:,.1f} are needed; "
            "make room, or write elsewhere"
        )


def table(records: Mapping[str, domains.DomainRecord]) -> str:
    """Returns documents, tokens and share of the tokens, a domain a line, for people to read."""
    rows = [(name, record.documents, record.tokens) for name, record in records.items()]
    documents, tokens = sum(row[1] for row in rows), sum(row[2] for row in rows)
    width = max(map(len, ["domain", *records]))
    lines = [f"{'domain':<{width}} {'documents':>15} {'tokens':>19} {'share':>7}"]
    for name, of_documents, of_tokens in [*rows, ("all", documents, tokens)]:
        share = of_tokens / max(1, tokens)
        lines.append(f"{name:<{width}} {of_documents:>15,} {of_tokens:>19,} {share:>7.1%}")
    return "\n".join(lines)
