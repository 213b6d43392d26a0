"""Brings a corpus into the study's form: text for trunks and for branches, and kinds of noise.

Every second document is for the branches alone, so that no arm, whatever its order or its blend,
sees again what the trunk has seen.

Repeated lines are easy and random bytes cannot be learnt: as one domain, what reweighting does to
them cancels. `--corpus` has `train/DOMAIN.jsonl` and `valid/DOMAIN.jsonl`, or `.jsonl.gz`, a JSON
object a line with `text`, and for the domain `noise` a `source` that begins `synthetic:KIND`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_KIND = re.compile(r"synthetic:([\w-]+)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="A corpus in the form of the study.")
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--train-bytes", type=int, metavar="N", help="a domain of each part; all")
    args = parser.parse_args(argv)
    try:
        write(args.corpus, args.output_dir, args.train_bytes)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class CorpusError(Exception):
    """The corpus cannot be used; the text names the file and says why."""


def write(corpus: Path, output: Path, most: int | None) -> None:
    """Writes the parts of a corpus, `trunk`, `branch` and `valid`, up to `most` bytes a domain.

    Raises:
        CorpusError: it is not in the form that the head of this file describes.
    """
    files = {split: _domains(corpus, split) for split in ("train", "valid")}
    if files["train"].keys() != files["valid"].keys():
        raise CorpusError(f"--corpus {corpus}: train/ and valid/ have other domains")
    for part, split, every, limit in (
        ("trunk", "train", (0, 2), most),
        ("branch", "train", (1, 2), most),
        ("valid", "valid", (0, 1), None),
    ):
        folder = output / part
        folder.mkdir(parents=True, exist_ok=True)
        for domain, path in files[split].items():
            found = 0
            with (folder / f"{domain}.jsonl").open("w", encoding="utf-8") as out:
                for text, name in documents(path, domain, every, limit):
                    out.write(json.dumps({"text": text, "domain": name}, ensure_ascii=False) + "\n")
                    found += 1
            if not found:
                raise CorpusError(f"{path}: no document for {part}")


def _domains(corpus: Path, split: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted((corpus / split).glob("*.jsonl*")):
        domain = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if not re.fullmatch(r"[\w.-]+", domain) or domain in files:
            raise CorpusError(f"{path}: name the file DOMAIN.jsonl or .jsonl.gz, once for a domain")
        files[domain] = path
    if len([name for name in files if not name.startswith("noise")]) < 2:
        raise CorpusError(
            f"--corpus {corpus}: {split}/ has fewer than two domains beside noise, files "
            "DOMAIN.jsonl or DOMAIN.jsonl.gz"
        )
    return files


def documents(
    path: Path, domain: str, every: tuple[int, int], most_bytes: int | None
) -> Iterator[tuple[str, str]]:
    """Yields the texts of a domain's file with the names of their domains, until enough are read.

    Args:
        path: the file.
        domain: its domain; of `noise` each kind is one, up to the same number of bytes.
        every: the first of a domain's documents that is taken, and how far the next one is.
        most_bytes: of UTF-8 text a domain.
    """
    seen: dict[str, int] = {}
    read: dict[str, int] = {}
    for text, source in _lines(path):
        name = domain
        if domain == "noise" and (kind := _KIND.match(source)):
            name = f"noise-{kind[1].replace('_', '-')}"
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % every[1] != every[0]:
            continue
        size = len(text.encode())
        if most_bytes is None or read.get(name, 0) + size <= most_bytes:
            read[name] = read.get(name, 0) + size
            yield text, name


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields text and source of each document of a file."""
    number = 0  # of the line that is read, for the error
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                record = json.loads(line)
                record["text"].encode()
                yield record["text"], str(record.get("source"))
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError) as error:
        raise CorpusError(
            f"{path}:{number}: no document, {type(error).__name__}: {error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
