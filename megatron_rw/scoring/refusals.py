"""Flags of a job that scoring refuses."""

from __future__ import annotations

from argparse import Namespace

from megatron_rw.errors import UserError
from megatron_rw.scoring.config import ScoreConfig
from megatron_rw.training.refusals.base import refuse_flags

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


def check_scoring(config: ScoreConfig, args: Namespace) -> None:
    """Refuses flags of a job, as validated by Megatron, that scoring cannot serve.

    Raises:
        UserError: The first one found.
    """
    refuse_flags(args, UNSUPPORTED, "drop it")
    if args.cuda_graph_impl != "none":
        raise UserError("--cuda-graph-impl wants one shape, and rows have several: drop it.")
    if config.score_stride is not None and config.score_stride > args.seq_length:
        raise UserError(
            f"--score-stride {config.score_stride} would leave tokens out: give at most "
            f"--seq-length, {args.seq_length}."
        )
