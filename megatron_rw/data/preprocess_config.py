"""The settings of preprocess_data, each of which is a flag."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from megatron_rw.command_line import require
from megatron_rw.data.text.domain_names import check_domain
from megatron_rw.data.text.records import MAX_LINE_BYTES
from megatron_rw.data.text.sources import ONE_DOMAIN_FLAG, InputFlags, Source, parse_shard
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.workers import available_cores

# Flags that do not change what is in a part of the output.
_NOT_OF_PARTS = (
    "input", "max_bad_fraction", "shard", "output_dir", "overwrite", "workers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Settings of preprocess_data."""

    inputs: InputFlags
    """Input."""

    tokenizer: TokenizerFlags
    """Tokenizer, with the names and defaults of Megatron's flags."""

    output_dir: Annotated[Path, arg(metavar="DIR")]
    """Directory of the datasets, made if it is not there."""

    overwrite: bool = False
    """Replace the datasets that --output-dir holds, and drop the unfinished work of another call
    there."""

    json_key: Annotated[str, arg(aliases=("--json-keys",), metavar="KEY")] = "text"
    """Field or column that holds the text."""

    domain: Annotated[str | None, ONE_DOMAIN_FLAG, arg(metavar="NAME")] = None
    """One domain for all documents."""

    txt_documents: Literal["file", "line"] = "file"
    """What of a .txt file is a document."""

    max_line_bytes: Annotated[int, arg(metavar="N")] = MAX_LINE_BYTES
    """Longer lines are rejected, and no more than this of one is held in memory."""

    max_bad_fraction: Annotated[float, arg(metavar="F")] = 0.001
    """End with an error if more than this share of the lines are no documents. Fewer are left out
    and listed in rejects.jsonl."""

    shard: Annotated[str | None, arg(metavar="I/N")] = None
    """Take share I, from 0, of N of the input files, as one task of a job array; join the shards'
    outputs with tools/merge_datasets.py."""

    append_eod: bool = False
    """End every document with the tokenizer's end-of-document token."""

    dedup: Literal["none", "exact"] = "none"
    """With "exact", keep only the first of documents with the same text, in whatever file and
    domain they are."""

    workers: Annotated[int, arg(metavar="N")] = field(default_factory=available_cores)
    """Number of processes, by default one per available core. It does not change the output."""

    def __post_init__(self) -> None:
        line, bad = self.max_line_bytes, self.max_bad_fraction
        require(self.workers >= 1, "--workers", self.workers, "a number of at least 1")
        require(line >= 1, "--max-line-bytes", line, "a number of at least 1")
        require(0 <= bad <= 1, "--max-bad-fraction", bad, "a number from 0 to 1")
        if self.domain is not None:
            check_domain(self.domain, "--domain")
        if self.shard is not None:
            parse_shard(self.shard)

    def domain_of(self, source: Source) -> str:
        """Returns the domain of a source's documents where no field holds it."""
        return self.domain if self.domain is not None else self.inputs.domain_of(source)

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that are read, the text first."""
        domain_key = self.inputs.domain_key
        return tuple(dict.fromkeys([self.json_key, *([domain_key] if domain_key else [])]))

    def part_settings(self) -> dict[str, Any]:
        """Returns the flags that decide what is in a part of the output, with their values."""
        values = asdict(self)
        tokenizer = values.pop("tokenizer")
        values |= values.pop("inputs")
        flags = {name: value for name, value in values.items() if name not in _NOT_OF_PARTS}
        named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        return {**named, "tokenizer": tokenizer}
