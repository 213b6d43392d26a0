"""Turns text into Megatron datasets, one per domain.

Into `--output-dir` go `<domain>_text_document.bin/.idx` for each domain, `domains.json` (see
`domains`), `blend.txt` for Megatron's `--data-args-path`, and `rejects.jsonl` with the lines that
are no documents, if there are any. They appear under their names only when all of them are
complete, `domains.json` last. Documents keep the order of the inputs whatever the number of
workers, so the bytes are the same for any.

Workers read, tokenize and write a part of the output for each chunk of the input; in the end the
parts are joined. An interrupted call goes on from its parts when it is repeated.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rw.data.command import exit_status
from megatron_rw.data.encoding import Encoder, Encoding, check_domain
from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.blend import blend_weights
from megatron_rw.data.indexed.joining import REJECTS_FILE, Joined, dataset_name, join, write_rejects
from megatron_rw.data.indexed.output import check_output_dir, publish
from megatron_rw.data.indexed.parts import Rejects, Store
from megatron_rw.data.preprocess_flags import parse
from megatron_rw.data.progress import Progress
from megatron_rw.data.resume import (
    earlier_chunk_bytes,
    is_published,
    is_unfinished,
    set_published,
    work_folder,
)
from megatron_rw.data.summary import say, table, too_many_bad
from megatron_rw.data.text.chunks import Reading, chunk_size, tasks
from megatron_rw.data.text.sentences import sentence_splitter
from megatron_rw.data.text.shards import shard_of
from megatron_rw.data.text.sources import STANDARD_INPUT, Source, find_sources
from megatron_rw.data.tokenizers.tokenizer import end_of_document_id, load_tokenizer, model_sha256
from megatron_rw.data.tokenizers.tokenizer_flags import tokenizer_flags
from megatron_rw.data.workers import run_unordered
from megatron_rw.errors import UserError
from megatron_rw.platform.quiet import silence

# Before this many lines, a bad one says little about the rest.
_EARLIEST_VERDICT = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = parse(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    silence("cpu")  # what megatron.core says at import about GPU packages; none is used here
    started = time.monotonic()
    sources = shard_of(find_sources(args.input), args.shard)
    # What an interrupted call has published is in nobody's way: it is this one's, or else
    # work_folder refuses.
    may_replace = args.overwrite or is_unfinished(args.output_dir)
    output_dir = check_output_dir(args.output_dir, may_replace)
    if len(args.json_keys) > 1:
        for key in args.json_keys:
            check_output_dir(args.output_dir / key, may_replace)
    reading, encoding = _plan(args, sources, output_dir)
    flags = tokenizer_flags(args)
    tokenizer = load_tokenizer(flags)
    if args.append_eod:
        eod = end_of_document_id(tokenizer, flags.tokenizer_model or flags.tokenizer_type)
        encoding = dataclasses.replace(encoding, eod=eod)
    record = domains.TokenizerRecord(
        type=flags.tokenizer_type,
        model=flags.tokenizer_model or flags.tokenizer_type,
        sha256=model_sha256(flags.tokenizer_model),
        vocab_size=tokenizer.vocab_size,
    )
    settings = _settings(args, reading, record)
    with work_folder(output_dir, settings, args.overwrite) as folder:
        if is_published(folder, sources):
            say("everything was in its place already")
            return
        store = Store(folder)
        encoder = Encoder(tokenizer, reading, encoding, store)
        _encode(args, sources, encoder, folder)
        joined = _join(args, sources, encoder, folder, output_dir, record)
        set_published(folder, sources)
    names = {(key, domain): domain for key, domain in joined.counts if key == 0}
    print(
        table(
            {domain: joined.counts[name] for name, domain in names.items()},
            joined.rejects,
            joined.duplicates,
            time.monotonic() - started,
        )
    )


def _plan(
    args: argparse.Namespace, sources: Sequence[Source], output_dir: Path
) -> tuple[Reading, Encoding]:
    """How documents are read and what becomes of them; the end-of-document id is still missing."""
    columns = [*args.json_keys, *([args.domain_key] if args.domain_key else [])]
    for source in sources:
        if source.format == "txt" and len(columns) > 1:
            raise UserError(
                f"{source.path}: a .txt file has no fields; leave out --domain-key and give one "
                "of --json-keys, or convert it to .jsonl"
            )
    if args.domain_key is None:
        _check_given_weights({_domain_of(source, args) for source in sources}, args)
    reading = Reading(
        chunk_bytes=earlier_chunk_bytes(output_dir) or chunk_size(sources),
        max_line_bytes=args.max_line_bytes,
        columns=tuple(dict.fromkeys(columns)),
        whole_files=args.txt_documents == "file",
    )
    encoding = Encoding(
        keys=tuple(args.json_keys),
        domain_key=args.domain_key,
        domain_of=lambda source: _domain_of(source, args),
        eod=None,
        max_document_tokens=args.max_document_tokens,
        splitter=sentence_splitter(args.sentence_language) if args.split_sentences else None,
        hashed=args.dedup == "exact",
    )
    return reading, encoding


def _domain_of(source: Source, args: argparse.Namespace) -> str:
    if args.domain is not None:
        return check_domain(args.domain, "--domain")
    where = f"{source.path}: rename it, or give --domain-by or --domain"
    if args.domain_by == "directory":
        where = f"{source.path} (--domain-by directory)"
    return check_domain(source.domain(args.domain_by), where)


def _check_given_weights(names: set[str], args: argparse.Namespace) -> None:
    """Refuses now what would be refused when all is tokenized."""
    given = dict(args.blend_weights or ())
    if given and given.keys() != names:
        raise UserError(
            f"--blend-weights are of {', '.join(sorted(given))}, and the domains are "
            f"{', '.join(sorted(names))}; give each of them one"
        )


def _settings(
    args: argparse.Namespace, reading: Reading, record: domains.TokenizerRecord
) -> dict[str, Any]:
    """Everything that decides what is in a part."""
    flags = dataclasses.asdict(tokenizer_flags(args))
    return {
        "format": 1,
        "chunk_bytes": reading.chunk_bytes,
        "tokenizer": {**flags, "sha256": record.sha256},
        **{
            f"--{name.replace('_', '-')}": getattr(args, name)
            for name in (
                "json_keys",
                "domain",
                "domain_key",
                "domain_by",
                "append_eod",
                "split_sentences",
                "sentence_language",
                "max_document_tokens",
                "max_line_bytes",
                "txt_documents",
                "dedup",
            )
        },
    }


def _encode(
    args: argparse.Namespace, sources: Sequence[Source], encoder: Encoder, folder: Path
) -> None:
    """Makes the parts that are missing."""
    store = Store(folder)
    rejects, records, done_bytes = Rejects(), 0, 0
    finished: dict[Source, frozenset[int] | None] = {}
    for source in sources:
        if source.path == STANDARD_INPUT:
            shutil.rmtree(store.folder(source), ignore_errors=True)  # it cannot be read again
        store.folder(source).mkdir(exist_ok=True)
        store.drop_damaged(source)
        numbers, whole = store.finished(source)
        finished[source] = None if whole else numbers
        done_bytes += source.size if whole else 0
        for _, part in store.parts(source):
            rejects.merge(part.rejects)
            records += part.records
    if records:
        say(f"going on from {records:,} documents that are done")
    progress = Progress("preprocess_data", sum(source.size for source in sources))
    progress.skip(done_bytes)
    work = tasks(sources, encoder.reading, args.workers, finished.__getitem__)
    for task, done in run_unordered(encoder, work, args.workers):
        records += done.records
        rejects.merge(done.rejects)
        _check(args, rejects, max(records, _EARLIEST_VERDICT), sources, store)
        progress.skip(task.skipped_bytes)
        progress.advance(task.stored_bytes, done.records, done.text_bytes)
    _check(args, rejects, records, sources, store)
    if records == 0:
        raise UserError(f"--input {' '.join(args.input)}: no documents")


def _check(
    args: argparse.Namespace,
    rejects: Rejects,
    records: int,
    sources: Sequence[Source],
    store: Store,
) -> None:
    if rejects.total > args.max_bad_fraction * (rejects.total + records):
        path = store.directory / REJECTS_FILE
        listed = write_rejects(sources, store, path)
        raise too_many_bad(listed, records, args.max_bad_fraction, path)


def _join(
    args: argparse.Namespace,
    sources: Sequence[Source],
    encoder: Encoder,
    folder: Path,
    output_dir: Path,
    record: domains.TokenizerRecord,
) -> Joined:
    """Joins the parts and gives everything its final name."""
    scratch = folder / "joined"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    several = len(args.json_keys) > 1
    outputs = [output_dir / key if several else output_dir for key in args.json_keys]
    directories = [scratch / key if several else scratch for key in args.json_keys]
    for directory in directories:
        directory.mkdir(exist_ok=True)
    say("joining the parts")
    rejects = folder / REJECTS_FILE
    joined = join(
        sources, Store(folder), directories, encoder.dtype, args.dedup == "exact", rejects
    )
    if joined.rejects.total:
        rejects.replace(output_dir / REJECTS_FILE)
    else:
        (output_dir / REJECTS_FILE).unlink(missing_ok=True)
    given = dict(args.blend_weights) if args.blend_weights else None
    for key, (directory, output) in enumerate(zip(directories, outputs, strict=True)):
        records = {
            domain: domains.DomainRecord(
                prefix=dataset_name(domain),
                documents=counts.documents,
                tokens=counts.tokens,
                max_token_id=counts.max_token_id,
            )
            for (of_key, domain), counts in joined.counts.items()
            if of_key == key
        }
        weights = blend_weights(records, args.blend_by, args.blend_temperature, given)
        output.mkdir(exist_ok=True)
        publish(directory, output, records, weights, record)
    return joined


if __name__ == "__main__":
    sys.exit(main())
