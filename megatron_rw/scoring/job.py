"""A run of scoring: the model built and loaded, block after block scored and written."""

import functools
import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from megatron.training.utils import print_rank_0

from megatron_rw import patching
from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.pair import bin_path
from megatron_rw.data.progress import Progress as PrintedProgress
from megatron_rw.data.progress import say
from megatron_rw.errors import UserError
from megatron_rw.integrations.groups import embedding_ranks
from megatron_rw.resilience import safe_pickle
from megatron_rw.resilience.watchdog import Progress, Rendezvous, watch
from megatron_rw.scoring import summary
from megatron_rw.scoring.command import ScoreConfig
from megatron_rw.scoring.folder import ScoreFolder
from megatron_rw.scoring.plan import Plan, describe, plan_of
from megatron_rw.scoring.scorer import Scorer, writes
from megatron_rw.training.arguments import megatron_config
from megatron_rw.training.callbacks.kernels import compile_on_all_ranks
from megatron_rw.training.patches import repairs
from megatron_rw.training.refusals.base import refuse_flags
from megatron_rw.training.settings import Settings

_FEW_MICRO_BATCHES = 10
# Flags of a job that scoring refuses.
UNSUPPORTED = {
    "mock_data": "has no dataset to score",
    "sft": "reads conversations and not .bin and .idx files",
    "use_megatron_fsdp": "was not tried with scoring",
    "use_torch_fsdp2": "was not tried with scoring",
    "hybrid_context_parallel": "cuts rows",
    "perform_rl_step": "brings a loss of its own",
    "logits_load_dir": "brings a loss of its own",
    "fp16_lm_cross_entropy": "rounds the losses to 16 bits",
    "context_parallel_size": "above 1 cuts rows, whose losses are not put together again, and "
    "scoring keeps no activations",
    "gtp_weight_remat_size": "was not tried with scoring",
}


def run(job: Settings, config: ScoreConfig) -> None:
    """Scores what is not scored yet, and finishes the folder. Collective over all ranks."""
    args, progress = job.megatron, Progress()
    check_scoring(config, args)
    # A row has one document, and Megatron's way to mask between documents is not needed.
    args.dataloader_inter_document_masking = False
    plan, path = plan_of(config, args), Path(config.score_dir)
    begun: list[Any] = [None, None]
    if args.rank == 0:
        record = describe(args, plan)
        begun = [record, ScoreFolder(path, record).begin()]
    patching.apply(repairs())
    with Rendezvous(args.distributed_timeout_minutes):
        training.initialize_megatron(get_embedding_ranks=functools.partial(embedding_ranks, args))
    compile_on_all_ranks(job)
    watch(args, progress)
    # Rank 0 alone has looked at the folder: another host may not see yet what it has made.
    dist.broadcast_object_list(begun, src=0)
    record, done = begun
    folder = ScoreFolder(path, record)
    if done is not None:
        _warn_of_small_blocks(plan, args.data_parallel_size)
        _score(Scorer(job, load_model(args), plan, progress), folder, done, progress)
    if writes():
        if done is not None:
            say("score_dataset", "all blocks are there; counting")
            domains = summary.summarise(folder)
            folder.finish({"bin_width": summary.BIN_WIDTH, "domains": domains})
        domains = folder.scores()["domains"]
        print("\n".join(summary.table(domains)), flush=True)
    progress.then("the end")
    dist.barrier()
    # Left to the interpreter's own end, threads of gloo have been seen to abort the process.
    dist.destroy_process_group()


def check_scoring(config: ScoreConfig, args: Namespace) -> None:
    """Refuses flags of a job, as validated by Megatron, that scoring cannot serve."""
    refuse_flags(args, UNSUPPORTED, "drop it")
    if args.cuda_graph_impl != "none":
        raise UserError("--cuda-graph-impl wants one shape, and rows have several: drop it.")
    if config.score_stride is not None and config.score_stride > args.seq_length:
        raise UserError(
            f"--score-stride {config.score_stride} would leave tokens out: give at most "
            f"--seq-length, {args.seq_length}."
        )


def _warn_of_small_blocks(plan: Plan, ranks: int) -> None:
    """Data-parallel ranks share a block's micro-batches, and wait where there are few to share."""
    each = plan.block_tokens / (plan.micro_batch_size * plan.seq_length * ranks)
    if ranks > 1 and each < _FEW_MICRO_BATCHES:
        print_rank_0(
            f"WARNING: --block-tokens {plan.block_tokens} gives each data-parallel rank some "
            f"{each:.1f} micro-batches at a time: with few, ranks wait for each other"
        )


def load_model(args: Namespace) -> list[Any]:
    """Builds the model's chunks of this rank, without an optimizer, and loads the checkpoint."""
    patching.apply(safe_pickle.patches())
    safe_pickle.load_weights_only()
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=megatron_config(args),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return list(model)


def _score(scorer: Scorer, folder: ScoreFolder, scored: dict[str, int], progress: Progress) -> None:
    """Scores and writes the documents that are missing, and counts them by dataset in `scored`."""
    datasets, number = folder.record["datasets"], itertools.count()
    size = sum(bin_path(facts["path"]).stat().st_size for facts in datasets.values())
    said = PrintedProgress("score_dataset", size)
    for name, facts in datasets.items():
        with DatasetReader(Path(facts["path"])) as reader:
            for block in reader.blocks(folder.record["rows"]["block_tokens"]):
                end = block.first + len(block.tokens)
                progress.begin(next(number), f"documents of {name} up to {end}")
                if end <= scored[name]:
                    said.skip(block.size)
                    continue
                losses = scorer.score(reader, block)
                scored[name] = end
                if losses is not None:
                    folder.write(name, block, losses, scored)
                    said.advance(block.size, len(block.tokens))
