"""Turns JSON-lines text into Megatron datasets, one per domain.

Into `--output-dir` go `<domain>_text_document.bin/.idx` for each domain, `domains.json` (see
`domains`) and `blend.txt` for Megatron's `--data-args-path`, with weights in proportion to tokens.
They appear under their names only when all of them are complete, `domains.json` last. Documents
keep the order of the input whatever the number of workers, so the bytes are the same for any.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_rw.data import domains
from megatron_rw.data.command import InputError, exit_status
from megatron_rw.data.dataset_writer import DatasetWriter, DomainCounts
from megatron_rw.data.encoding import Batch, Encoder, encode_in_order
from megatron_rw.data.jsonl import check_inputs, read_lines
from megatron_rw.data.tokenizer import (
    add_tokenizer_flags,
    end_of_document_id,
    fingerprint,
    load_tokenizer,
    tokenizer_flags,
)
from megatron_rw.platform.quiet import silence

BLEND_FILE = "blend.txt"
# Large enough that handing a batch to a process costs nothing beside tokenizing it, small enough
# that a few per worker are no memory to speak of.
_BATCH_BYTES = 1 << 19
_PROGRESS_SECONDS = 5.0

_EXAMPLE = """\
example:
  python tools/preprocess_data.py --input corpus/*.jsonl.gz --domain-key domain --append-eod \\
      --tokenizer-model tokenizer/bpe8k.model --output-dir data/train
  then train with --data-args-path data/train/blend.txt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parse(argv)
    return exit_status(lambda: _run(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py",
        description="Tokenize JSON-lines text into Megatron .bin/.idx datasets, one per domain.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl or .jsonl.gz files",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="made if it is not there"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the datasets that --output-dir holds"
    )
    add_tokenizer_flags(parser)
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="field that holds the text (text)"
    )
    parser.add_argument(
        "--domain-key",
        metavar="KEY",
        help="field that holds the document's domain; without it, the domain is the file's name "
        "up to the first dot",
    )
    parser.add_argument(
        "--append-eod",
        action="store_true",
        help="end every document with the tokenizer's end-of-document token",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tokenizing processes (one per available core: %(default)s); does not change "
        "the output",
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def _run(args: argparse.Namespace) -> None:
    silence("cpu")  # what megatron.core says at import about GPU packages; none is used here
    check_inputs(args.input)
    output_dir = _check_output_dir(args.output_dir, args.overwrite)
    flags = tokenizer_flags(args)
    model = flags.model or flags.type
    tokenizer = load_tokenizer(flags)
    eod = end_of_document_id(tokenizer, model) if args.append_eod else None
    encoder = Encoder(tokenizer, args.json_key, args.domain_key, eod)
    record = domains.TokenizerRecord(
        type=flags.type,
        model=model,
        sha256=fingerprint(flags.model),
        vocab_size=tokenizer.vocab_size,
    )

    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".preprocess_data-") as scratch:
        with DatasetWriter(Path(scratch), encoder.dtype) as writer:
            progress = _Progress()
            for encoded in encode_in_order(_batches(args.input), encoder, args.workers):
                writer.add(encoded)
                progress.report(writer.counts.values())
            counts = writer.finalize()
        _publish(Path(scratch), output_dir, record, counts)
    print(_table(counts))


def _check_output_dir(output_dir: Path, overwrite: bool) -> Path:
    """Returns the absolute output directory, if datasets may be put there."""
    absolute = output_dir.absolute()
    if any(character.isspace() for character in str(absolute)):
        raise InputError(
            f"--output-dir {absolute}: Megatron splits {BLEND_FILE} at white space; "
            "give a path without any"
        )
    if (absolute / domains.FILE_NAME).exists() and not overwrite:
        raise InputError(
            f"--output-dir {output_dir}: holds datasets already; give another directory, or "
            "--overwrite to replace them"
        )
    return absolute


def _batches(paths: Sequence[Path]) -> Iterator[Batch]:
    """Yields the lines of the inputs in order, in batches of about `_BATCH_BYTES`."""
    for path in paths:
        lines: list[tuple[int, bytes]] = []
        size = 0
        for number, line in read_lines(path):
            lines.append((number, line))
            size += len(line)
            if size >= _BATCH_BYTES:
                yield Batch(path, lines)
                lines, size = [], 0
        if lines:
            yield Batch(path, lines)


def _publish(
    scratch: Path,
    output_dir: Path,
    tokenizer: domains.TokenizerRecord,
    counts: dict[str, DomainCounts],
) -> None:
    """Moves the finished datasets to their names, `domains.json` last.

    That file goes first when datasets are replaced: while it is there, what it says is true.
    """
    manifest = output_dir / domains.FILE_NAME
    if manifest.exists():
        stale = _listed_prefixes(manifest)
        manifest.unlink()
        (output_dir / BLEND_FILE).unlink(missing_ok=True)
        for prefix in stale:
            for suffix in (".bin", ".idx"):
                (output_dir / f"{prefix}{suffix}").unlink(missing_ok=True)
    for dataset in sorted(scratch.iterdir()):
        dataset.replace(output_dir / dataset.name)

    blend = scratch / BLEND_FILE
    blend.write_text(_blend(output_dir, counts), "utf-8")
    blend.replace(output_dir / BLEND_FILE)
    domains.DomainsFile(
        tokenizer=tokenizer,
        domains={
            name: domains.DomainRecord(
                prefix=count.prefix,
                documents=count.documents,
                tokens=count.tokens,
                max_token_id=count.max_token_id,
            )
            for name, count in counts.items()
        },
    ).save(manifest)


def _listed_prefixes(manifest: Path) -> list[str]:
    try:
        return [record.prefix for record in domains.DomainsFile.load(manifest).domains.values()]
    except ValueError as error:
        raise InputError(str(error)) from error


def _blend(output_dir: Path, counts: dict[str, DomainCounts]) -> str:
    """Returns Megatron's "weight prefix weight prefix ...", a dataset a line."""
    total = sum(count.tokens for count in counts.values())
    return "".join(
        f"{count.tokens / total:.6g} {output_dir / count.prefix}\n" for count in counts.values()
    )


def _table(counts: dict[str, DomainCounts]) -> str:
    total = DomainCounts(
        prefix="",
        documents=sum(count.documents for count in counts.values()),
        tokens=sum(count.tokens for count in counts.values()),
        text_bytes=sum(count.text_bytes for count in counts.values()),
    )
    width = max(len("domain"), *map(len, counts))
    lines = [
        f"{'domain':<{width}} {'documents':>12} {'tokens':>15} {'bytes/token':>11} {'share':>7}"
    ]
    for name, count in [*counts.items(), ("all", total)]:
        lines.append(
            f"{name:<{width}} {count.documents:>12,} {count.tokens:>15,} "
            f"{count.text_bytes / count.tokens:>11.2f} {count.tokens / total.tokens:>7.1%}"
        )
    return "\n".join(lines)


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self) -> None:
        self._started = self._reported = time.monotonic()

    def report(self, counts: Iterable[DomainCounts]) -> None:
        """Prints what is done so far, if it is time to."""
        now = time.monotonic()
        if now - self._reported < _PROGRESS_SECONDS:
            return
        self._reported = now
        done = list(counts)
        megabytes = sum(count.text_bytes for count in done) / 1e6
        print(
            f"preprocess_data: {sum(count.documents for count in done):,} documents, "
            f"{megabytes:,.1f} MB of text, {megabytes / (now - self._started):.1f} MB/s",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
