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
                            NAME.idx, summed in fp64; NaN where there is none. (Documents are
                            what GPTDataset takes for them: the sequences of the index.)
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

from __future__ import annotations

import sys

from megatron_rw.command_line import parse_known
from megatron_rw.errors import reported
from megatron_rw.platform import select_device
from megatron_rw.platform.launch import prepare_process
from megatron_rw.scoring.config import ScoreConfig, job_flags


def main() -> None:
    """Run the tool."""
    argv = sys.argv[1:]
    with reported("scoring datasets", alike=True):
        prepare_process()
        config, flags = parse_known(ScoreConfig, argv, __doc__)
        device = select_device(argv)

        # They import Megatron, which has to wait until the device is chosen.
        from megatron_rw.observability.memory import explaining
        from megatron_rw.resilience.watchdog import Progress
        from megatron_rw.scoring.job import run
        from megatron_rw.training.arguments import parse_job_flags

        job = parse_job_flags(job_flags(config, flags), device)
        progress = Progress()
        with explaining(job.megatron, progress):
            run(job, config, progress)
