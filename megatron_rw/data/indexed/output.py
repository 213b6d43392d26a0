"""A directory of finished datasets: one per domain, `domains.json` and `blend.txt`."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_rw.data.indexed import domains
from megatron_rw.errors import UserError
from megatron_rw.platform.files import write_complete

BLEND_FILE = "blend.txt"


def check_output_dir(output_dir: Path, overwrite: bool) -> Path:
    """Returns the absolute path of a directory for datasets, which need not exist.

    Raises a `UserError` if it holds datasets that may not be replaced, or their `domains.json` is
    malformed.
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
    _listed_files(absolute / domains.FILE_NAME)  # refuses a malformed file before the work
    return absolute


def publish(
    scratch: Path,
    output_dir: Path,
    records: Mapping[str, domains.DomainRecord],
    tokenizer: domains.TokenizerRecord | None,
) -> None:
    """Moves finished datasets to their names, `domains.json` last.

    When datasets are replaced, the old `domains.json` is removed first, so that one that is there
    is always true. `scratch` holds the `.bin/.idx` files and nothing else, on the file system of
    `output_dir`, the absolute path of an existing directory. `records` maps a domain to what is in
    it; its weight in the blend is its share of the tokens. No `domains.json` is written if it is
    unknown which tokenizer made the token ids.
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

    # Megatron's "weight prefix weight prefix ...", a dataset a line.
    total = max(1, sum(record.tokens for record in records.values()))
    lines = (f"{r.tokens / total:.6g} {output_dir / r.prefix}\n" for r in records.values())
    write_complete(blend, "".join(lines))
    if tokenizer is not None:
        domains.DomainsFile(tokenizer=tokenizer, domains=records).save(manifest)


def _listed_files(manifest: Path) -> set[str]:
    if not manifest.exists():
        return set()
    listed = domains.DomainsFile.load(manifest).domains.values()
    return {f"{record.prefix}{suffix}" for record in listed for suffix in (".bin", ".idx")}


def check_space(directory: Path, size: int) -> None:
    """Checks that the disk of an existing directory has room for so much; a `UserError` if not."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(
            f"{directory}: {free / 1e9:,.1f} GB are free, and {size / 1e9:,.1f} are needed; "
            "make room, or write elsewhere"
        )


def table(
    records: Mapping[str, domains.DomainRecord], text_bytes: Mapping[str, int] | None = None
) -> str:
    """Returns documents, tokens and share of the tokens, a domain a line, for people to read.

    Where the UTF-8 bytes of text of each domain are given, so are the bytes per token.
    """
    rows = [(name, record.documents, record.tokens) for name, record in records.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    sizes = None if text_bytes is None else [*text_bytes.values(), sum(text_bytes.values())]
    width = max(map(len, ["domain", *records]))
    bytes_title = "" if sizes is None else f" {'bytes/token':>11}"
    lines = [f"{'domain':<{width}} {'documents':>15} {'tokens':>19}{bytes_title} {'share':>7}"]
    for index, (name, documents, tokens) in enumerate(rows):
        share = tokens / max(1, rows[-1][2])
        per_token = "" if sizes is None else f" {sizes[index] / tokens:>11.2f}"
        lines.append(f"{name:<{width}} {documents:>15,} {tokens:>19,}{per_token} {share:>7.1%}")
    return "\n".join(lines)
