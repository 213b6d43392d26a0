r"""Losses of a checkpoint on every token and every document of Megatron datasets.

    torchrun --nproc-per-node 8 tools/score_dataset.py <the model's flags> \
        --load checkpoints/reference --data-path data/train --score-dir scores

The model's flags are those of pretrain_gpt_rw.py: a job's can be given as they are, or
--use-checkpoint-args. Flags on steps and checkpoints, such as --save, are ignored. Any tensor,
pipeline and expert parallelism is possible, the rest is data parallel; context parallelism is
refused. The folder of --score-dir, which all hosts must share, then holds for every dataset
NAME.bin/.idx:

  NAME.token_losses.npy     float32, value i is the loss of token i of NAME.bin: -ln p of it, in
                            nats, given the tokens before it in its document. NaN for the first
                            token of a document, which nothing predicts.
  NAME.document_losses.npy  float32, value k is the mean over the tokens of document k of
                            NAME.idx, summed in fp64; NaN where there is none.
  NAME.document_tokens.npy  int32, how many tokens that mean is over.
  scores.json               checkpoint, model, datasets with their fingerprints, and figures and
                            a histogram of each domain, which are also printed.

A document longer than --seq-length is scored in several rows; --score-stride gives the first tokens
of each row more context. A killed run goes on when it is started again with the same flags, on any
number of data-parallel ranks, and ends in the same bytes. Another tensor-parallel size or
--micro-batch-size, or other hardware, changes the last bits of the losses. Experts with a capacity
(--moe-expert-capacity-factor) make a loss depend on the other rows.

It was run on the CPU over gloo; not on GPUs yet. pretrain_gpt_rw.py --help lists the model's
flags; scoring's own are:
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rw.command_line import parse_known, require
from megatron_rw.data.indexed.domains import FILE_NAME, DomainsFile
from megatron_rw.data.indexed.pair import is_dataset
from megatron_rw.errors import UserError, reported
from megatron_rw.platform import select_device
from megatron_rw.platform.launch import prepare_process

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

    def __post_init__(self) -> None:
        stride, tokens = self.score_stride, self.block_tokens
        require(stride is None or stride >= 1, "--score-stride", stride, "a number of at least 1")
        require(bool(self.load), "--load", "''", "the folder of the checkpoint")
        require(bool(self.score_dir), "--score-dir", "''", "a folder to write to")
        require(tokens >= 1, "--block-tokens", tokens, "a number of at least 1")


@dataclass(frozen=True, kw_only=True)
class IgnoredFlags:
    """Flags of a job about its steps, its data's order or its checkpoints, which scoring drops."""

    save: str | None = None
    save_interval: str | None = None
    async_save: bool = False
    pretrained_checkpoint: str | None = None
    non_persistent_ckpt_type: str | None = None
    non_persistent_save_interval: str | None = None
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
        if is_dataset(Path(prefix)):
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


def main() -> None:
    """Run the tool."""
    argv = sys.argv[1:]
    with reported("scoring datasets", alike=True):
        prepare_process()
        config, flags = parse_known(ScoreConfig, argv, __doc__)
        device = select_device(argv)

        # They import Megatron, which has to wait until the device is chosen.
        from megatron_rw.scoring.job import run
        from megatron_rw.training.arguments import parse_job_flags

        run(parse_job_flags(job_flags(config, flags), device), config)
