"""Turns text into Megatron datasets, one per domain.

Workers read, tokenize and write a part of the output for each chunk of the input; in the end the
parts are joined. docs/data.md says what is written. Documents keep the order of the inputs, and
files get their names when all are complete, `domains.json` last.
"""

import shutil
import time
from collections import Counter
from collections.abc import Sequence

from megatron_rw.command_line import parse
from megatron_rw.data.encoding import Encoder
from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.output import (
    check_output_dir,
    publish,
    table,
)
from megatron_rw.data.indexed.parts import REJECTS_FILE, Store, join, write_rejects
from megatron_rw.data.preprocess_config import PreprocessConfig
from megatron_rw.data.progress import Progress, duration, say
from megatron_rw.data.resume import FOLDER, earlier_chunk_bytes, remove_leftovers, work_folder
from megatron_rw.data.text.chunks import chunk_size, tasks
from megatron_rw.data.text.records import too_many_bad
from megatron_rw.data.text.sources import Source, find_sources, shard_of
from megatron_rw.data.tokenizers.tokenizer import load_tokenizer, model_sha256
from megatron_rw.data.workers import run_unordered
from megatron_rw.errors import UserError, reported

_TOOL = "preprocess_data"
_DESCRIPTION = """Tokenize text into Megatron .bin/.idx datasets, one per domain.

example:
  python tools/preprocess_data.py --input corpus/*.jsonl.gz --domain-key domain --append-eod \\
      --tokenizer-model tokenizer/bpe8k.model --output-dir data/train
  then train with --data-args-path data/train/blend.txt --split 98,1,1

An interrupted call continues where it was when it is repeated. docs/data.md has the whole way from
raw text to a training run."""
# About how many parts there are at most: few enough for a file system, and each large enough.
_CHUNKS = 2048


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported("preprocessing text"):
        _run(parse(PreprocessConfig, argv, _DESCRIPTION))


def _run(config: PreprocessConfig) -> None:
    started = time.monotonic()
    sources = shard_of(find_sources(config.inputs.input), config.shard)
    _check(config, sources)
    tokenizer = load_tokenizer(config.tokenizer)
    flags = config.tokenizer
    record = domains.TokenizerRecord(
        type=flags.tokenizer_type,
        model=flags.tokenizer_model or flags.tokenizer_type,
        sha256=model_sha256(flags.tokenizer_model),
        vocab_size=tokenizer.vocab_size,
    )
    output_dir = config.output_dir.absolute()
    chunk_bytes = earlier_chunk_bytes(output_dir) or chunk_size(
        sum(source.text_bytes for source in sources), _CHUNKS
    )
    store = Store(output_dir / FOLDER, sources)
    encoder = Encoder(config, tokenizer, chunk_bytes, store)
    settings = {
        "format": 5,
        "chunk_bytes": chunk_bytes,
        "tokenizer sha256": record.sha256,
        **config.part_settings(),
    }
    with work_folder(output_dir, settings, config.overwrite):
        _encode(encoder)
        _join(encoder, record, started)


def _check(config: PreprocessConfig, sources: Sequence[Source]) -> None:
    """Refuses at the start what would be refused after all is tokenized, and tells the domains."""
    remove_leftovers(config.output_dir.absolute())
    # Datasets that an interrupted call has published may be replaced: they are this call's, or
    # else `work_folder` refuses.
    may_replace = config.overwrite or (config.output_dir / FOLDER).exists()
    check_output_dir(config.output_dir, may_replace)
    for source in sources:
        if source.format == "txt" and len(config.columns) > 1:
            raise UserError(
                f"{source.path}: a .txt file has no fields; leave out --domain-key, or convert it "
                "to .jsonl"
            )
    if config.inputs.domain_key is not None:
        return
    files = Counter(config.domain_of(source) for source in sources)
    if config.domain is not None or config.inputs.domain_by != "corpus":
        return
    shards = [source for source in sources if source.domain("file") != source.domain("corpus")]
    if shards:
        listed = ", ".join(f"{name} ({count:,})" for name, count in files.most_common(10))
        more = f" and {len(files) - 10:,} more" if len(files) > 10 else ""
        say(
            _TOOL,
            f"files such as {shards[0].name} are shards, and their number names no domain. The "
            f"domains, with their number of files: {listed}{more}. --domain-by file makes each "
            "file a domain",
        )


def _encode(encoder: Encoder) -> None:
    """Makes the parts that are missing."""
    config, store = encoder.config, encoder.store
    store.prepare()
    records = rejects = 0
    for _, _, part in store.parts():
        records += part.records
        rejects += part.rejects.total()
    if records:
        say(_TOOL, f"going on from {records:,} documents that are done")
    sources = store.sources
    progress = Progress(_TOOL, sum(source.size for source in sources))
    progress.skip(sum(source.size for source in sources if store.finished(source) is None))
    work = tasks(sources, encoder.reading, config.workers, store.finished)
    for task, result in run_unordered(encoder, work, config.workers):
        records += result.records
        rejects += result.rejects
        if too_many_bad(rejects, records, config.max_bad_fraction, at_end=False):
            break
        progress.skip(task.skipped_bytes)
        progress.advance(task.stored_bytes, result.records, result.text_bytes)
    if too_many_bad(rejects, records, config.max_bad_fraction, at_end=True):
        raise _bad_lines(encoder, records)
    if records == 0:
        raise UserError(f"--input {' '.join(config.inputs.input)}: no documents")


def _bad_lines(encoder: Encoder, records: int) -> UserError:
    """Returns the error of more bad lines than allowed, with the first line of each kind."""
    path = encoder.store.directory / REJECTS_FILE
    rejects = write_rejects(encoder.store, path)
    examples = "".join(
        f"\n  {count:,} x {kind}; {file}, line {line}: {reason}"
        for kind, count in rejects.counts.most_common()
        for file, line, reason in [rejects.first[kind]]
    )
    total = rejects.counts.total()
    return UserError(
        f"{total:,} of {total + records:,} lines are bad, more than --max-bad-fraction "
        f"{encoder.config.max_bad_fraction:g} allows; correct them, or allow more and repeat the "
        "call, which goes on from what is done; where other flags are wrong, such as --domain-key, "
        f"correct those and add --overwrite. All of them are in {path}{examples}"
    )


def _join(encoder: Encoder, tokenizer: domains.TokenizerRecord, started: float) -> None:
    """Joins the parts, gives everything its final name, and says what was made."""
    config, store = encoder.config, encoder.store
    say(_TOOL, "joining the parts")
    scratch = store.directory / "joined"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    joined = join(store, scratch, encoder.dtype, config.dedup == "exact")
    listed, final = store.directory / REJECTS_FILE, config.output_dir / REJECTS_FILE
    rejects = write_rejects(store, listed)
    if rejects.counts:
        listed.replace(final)
    else:
        final.unlink(missing_ok=True)
    publish(scratch, config.output_dir.absolute(), joined.records, tokenizer)
    print(table(joined.records, joined.text_bytes))
    if rejects.counts:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in rejects.counts.items())
        print(f"rejected: {rejects.counts.total():,} lines ({kinds}), listed in {REJECTS_FILE}")
    if joined.duplicates:
        print(f"duplicates left out: {joined.duplicates:,}")
    megabytes, seconds = joined.text_bytes.total() / 1e6, time.monotonic() - started
    print(f"{megabytes:,.1f} MB in {duration(seconds)}, {megabytes / seconds:.1f} MB/s")
