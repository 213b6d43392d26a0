"""The flags of scoring, and what they make of a job's flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rw.command_line import parse_known, require
from megatron_rw.data.indexed.domains import FILE_NAME, DomainsFile
from megatron_rw.errors import UserError
from megatron_rw.platform.pictures import check_picture

# What scoring needs of Megatron, whatever the job's flags say.
_FORCED = (
    "--skip-train --eval-iters 0 --no-load-optim --no-load-rng --exit-on-missing-checkpoint "
    "--no-create-attention-mask-in-dataloader --reweight-strategy none --split 1"
).split()


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What scoring itself is told."""

    load: str
    """Folder of the checkpoint; --ckpt-step may name an iteration of it."""

    score_dir: str
    """Folder for the scores."""

    data_path: tuple[str, ...] = ()
    """Datasets, as prefixes of .bin and .idx or as folders with a domains.json. Weights between
    them are ignored."""

    score_stride: int | None = None
    """Tokens from one row of a long document to the next. What is left of --seq-length is context
    for the first losses of a row. By default --seq-length, which gives no context."""

    block_tokens: int = 1 << 22
    """Tokens that are scored, written and recorded together: what a killed run computes again. Give
    some 20 x --seq-length x --micro-batch-size for each data-parallel rank; with less, ranks wait
    for each other."""

    picture: Path | None = None
    """Draw the histograms into this file, .png or another format (needs matplotlib)."""

    def __post_init__(self) -> None:
        stride, tokens = self.score_stride, self.block_tokens
        require(stride is None or stride >= 1, "--score-stride", stride, "a number of at least 1")
        require(tokens >= 1, "--block-tokens", tokens, "a number of at least 1")
        if self.picture is not None:
            check_picture(self.picture)


@dataclass(frozen=True, kw_only=True)
class IgnoredFlags:
    """Flags of a job about its steps, its data's order or its checkpoints, which scoring drops."""

    save: str | None = None
    save_interval: str | None = None
    async_save: bool = False
    global_batch_size: str | None = None
    rampup_batch_size: tuple[str, str, str] | None = None
    split: str | None = None


def job_flags(config: ScoreConfig, flags: Sequence[str]) -> list[str]:
    """Returns the flags that Megatron is to parse, out of scoring's and a job's own."""
    _, kept = parse_known(IgnoredFlags, flags, "")
    data = ["--data-path", *expanded(config.data_path)] if config.data_path else []
    return [*kept, "--load", config.load, *_FORCED, *data]


def expanded(paths: Sequence[str]) -> list[str]:
    """Returns the dataset prefixes of a `--data-path`, without weights and folders."""
    # Importing Megatron has to wait until the device is chosen.
    from megatron.core.datasets.utils import get_blend_from_list

    prefixes, _ = get_blend_from_list(list(paths))
    found: list[str] = []
    for prefix in prefixes:
        path = os.path.join(prefix, FILE_NAME)
        if not os.path.isdir(prefix):
            found.append(prefix)
        elif os.path.isfile(path):
            records = DomainsFile.load(path).domains.values()
            found += [os.path.join(prefix, record.prefix) for record in records]
        else:
            raise UserError(
                f"--data-path {prefix}: a folder without a {FILE_NAME}; give the prefixes of its "
                ".bin and .idx files."
            )
    return found
