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
    most = args.train_bytes
    for part, split, every, limit in (
        ("trunk", "train", (0, 2), most),
        ("branch", "train", (1, 2), most),
        ("valid", "valid", (0, 1), None),
    ):
        files = sorted((args.corpus / split).glob("*.jsonl*"))
        if len(files) < 2:
            print(f"error: --corpus {args.corpus}: {split}/ has fewer than two domains, files "
                  "DOMAIN.jsonl or DOMAIN.jsonl.gz", file=sys.stderr)  # fmt: skip
            return 2
        folder = args.output_dir / part
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            domain = path.name.split(".")[0]
            with (folder / f"{domain}.jsonl").open("w", encoding="utf-8") as out:
                for text, name in documents(path, domain, every, limit):
                    out.write(json.dumps({"text": text, "domain": name}, ensure_ascii=False) + "\n")
    return 0


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
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            name = domain
            if domain == "noise" and (kind := _KIND.match(record.get("source", ""))):
                name = f"noise-{kind[1].replace('_', '-')}"
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % every[1] != every[0]:
                continue
            size = len(record["text"].encode())
            if most_bytes is None or read.get(name, 0) + size <= most_bytes:
                read[name] = read.get(name, 0) + size
                yield record["text"], name


if __name__ == "__main__":
    sys.exit(main())
