"""A directory of finished datasets: one per domain, `domains.json` and `blend.txt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_rw.data import domains
from megatron_rw.data.blend import BLEND_FILE, blend_text
from megatron_rw.data.command import InputError


def check_output_dir(output_dir: Path, overwrite: bool) -> Path:
    """Returns the absolute path of a directory into which datasets may be put.

    Args:
        output_dir: As given by `--output-dir`; it need not exist.
        overwrite: Whether datasets that it holds may be replaced.

    Raises:
        InputError: If they may not.
    """
    absolute = output_dir.absolute()
    if any(character.isspace() for character in str(absolute)):
        raise InputError(
            f"--output-dir {absolute}: Megatron splits {BLEND_FILE} at white space; "
            "give a path without any"
        )
    there = [name for name in (domains.FILE_NAME, BLEND_FILE) if (absolute / name).exists()]
    if there and not overwrite:
        raise InputError(
            f"--output-dir {output_dir}: holds datasets already ({there[0]}); give another "
            "directory, or --overwrite to replace them"
        )
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

    Raises:
        InputError: If the `domains.json` of datasets to be replaced is malformed.
    """
    manifest, blend = output_dir / domains.FILE_NAME, output_dir / BLEND_FILE
    stale = _listed_files(manifest) if manifest.exists() else set()
    manifest.unlink(missing_ok=True)
    blend.unlink(missing_ok=True)
    for file in sorted(scratch.iterdir()):
        stale.discard(file.name)
        file.replace(output_dir / file.name)
    for name in stale:
        (output_dir / name).unlink(missing_ok=True)

    partial = scratch / BLEND_FILE
    prefixes = {name: output_dir / record.prefix for name, record in records.items()}
    partial.write_text(blend_text(weights, prefixes), "utf-8")
    partial.replace(blend)
    if tokenizer is not None:
        domains.DomainsFile(tokenizer=tokenizer, domains=records).save(manifest)


def _listed_files(manifest: Path) -> set[str]:
    try:
        listed = domains.DomainsFile.load(manifest).domains.values()
    except ValueError as error:
        raise InputError(str(error)) from error
    return {f"{record.prefix}{suffix}" for record in listed for suffix in (".bin", ".idx")}
