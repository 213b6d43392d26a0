"""A run of scoring: the model built and loaded, block after block scored and written."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.utils import print_rank_0

from megatron_rw import patching
from megatron_rw.errors import UserError
from megatron_rw.resilience import safe_pickle
from megatron_rw.resilience.watchdog import Progress, Rendezvous, watch
from megatron_rw.scoring import summary
from megatron_rw.scoring.config import ScoreConfig
from megatron_rw.scoring.folder import BlockWriter, ScoreFolder
from megatron_rw.scoring.plan import Plan
from megatron_rw.scoring.scorer import Scorer, writes
from megatron_rw.training.embeddings import embedding_ranks
from megatron_rw.training.patches import repairs
from megatron_rw.training.settings import Settings

_PROGRESS_SECONDS = 10.0
_FEW_MICRO_BATCHES = 10


def run(
    settings: Settings,
    config: ScoreConfig,
    plan: Plan,
    job: dict[str, Any] | None,
    done: dict[str, int] | None,
    progress: Progress,
) -> None:
    """Score what is not scored yet, and finish the folder. Collective over all ranks.

    Args:
        settings: Of the job, validated.
        config: of scoring.
        plan: how the datasets are cut.
        job: on rank 0, see `config.describe`.
        done: on rank 0, how many blocks of each dataset are there; None when the job is complete.
        progress: told how far the rank is.

    Raises:
        UserError: a dataset, or where the scores go, is not as it should be.
    """
    args = settings.megatron
    patching.apply(repairs())
    rendezvous = Rendezvous(args.distributed_timeout_minutes)
    rendezvous.begin()
    training.initialize_megatron(get_embedding_ranks=functools.partial(embedding_ranks, args))
    rendezvous.end()
    watch(args, progress)
    # Rank 0 has looked at the folder before; another host may not see yet what it has made.
    shared: list[Any] = [job, done]
    dist.broadcast_object_list(shared, src=0)
    job, done = shared
    assert job is not None
    folder = ScoreFolder(config.score_dir)
    if done is not None:
        _warn_of_small_blocks(args, plan)
        scorer = Scorer(settings, _load(args), plan, progress)
        _score(scorer, folder, plan, job, done, progress)
    if writes():
        if done is not None:
            _say("all blocks are there; counting")
            domains = summary.summarise(folder, job["datasets"])
            folder.finish(job, {"bin_width": summary.BIN_WIDTH, "domains": domains})
        domains = folder.summary()["domains"]
        print("\n".join(summary.table(domains)), flush=True)
        if config.picture is not None:
            summary.draw(domains, config.picture)
    progress.then("the end")
    dist.barrier()
    # Left to the interpreter's own end, threads of gloo have been seen to abort the process.
    dist.destroy_process_group()


def _warn_of_small_blocks(args: Namespace, plan: Plan) -> None:
    """Ranks share a block's micro-batches, and wait where there are few to share."""
    each = plan.block_tokens / (plan.micro_batch_size * plan.seq_length * args.data_parallel_size)
    if args.data_parallel_size > 1 and each < _FEW_MICRO_BATCHES:
        print_rank_0(
            f"WARNING: --block-tokens {plan.block_tokens} gives each data-parallel rank some "
            f"{each:.1f} micro-batches at a time: with few, ranks wait for each other"
        )


def _load(args: Namespace) -> list[Any]:
    """The model's chunks on this rank, with the checkpoint's weights and without an optimizer."""
    patching.apply(safe_pickle.patches())
    safe_pickle.load_weights_only()
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return list(model)


def _score(
    scorer: Scorer,
    folder: ScoreFolder,
    plan: Plan,
    job: dict[str, Any],
    done: dict[str, int],
    progress: Progress,
) -> None:
    """Score and write the blocks that are missing."""
    datasets = {name: plan.blocks(facts["path"]) for name, facts in job["datasets"].items()}
    report = _Report(sum(map(len, datasets.values())), sum(done.values()))
    for name, blocks in datasets.items():
        with contextlib.ExitStack() as stack:
            writer: BlockWriter | None = None
            for number in range(done[name], len(blocks)):
                block = blocks[number]
                progress.begin(report.blocks, f"block {number} of {name}")
                losses = scorer.score(job["datasets"][name]["path"], block)
                if losses is not None:
                    writer = writer or stack.enter_context(BlockWriter(folder, name))
                    with _naming(folder):
                        writer.write(block, losses)
                        done[name] = number + 1
                        folder.record(job, done)
                report.add(block.tokens, speaks=losses is not None)


@contextlib.contextmanager
def _naming(folder: ScoreFolder) -> Iterator[None]:
    """Say of a failed write where it was, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--score-dir {folder.path}: cannot be written to ({error.strerror}); mend that and "
            "start again with the same flags, what is there is kept"
        ) from error


class _Report:
    """Says every few seconds how far the run is.

    Args:
        total: blocks of the job.
        done: how many of them are there already.

    Attributes:
        blocks: that are there now.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self.blocks = total, done
        self._tokens = 0
        self._started = self._said = time.monotonic()

    def add(self, tokens: int, speaks: bool) -> None:
        """A block is there; `speaks` where the rank has the word."""
        self.blocks += 1
        self._tokens += tokens
        now = time.monotonic()
        if speaks and now - self._said >= _PROGRESS_SECONDS:
            self._said = now
            rate = self._tokens / (now - self._started)
            _say(f"{self.blocks:,} of {self._total:,} blocks, {rate:,.0f} tokens/s")


def _say(message: str) -> None:
    print(f"score_dataset: {message}", file=sys.stderr, flush=True)
