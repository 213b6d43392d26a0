"""Refusals of settings for bad numbers that contradict Megatron's flags."""

from __future__ import annotations

from megatron_rw.errors import UserError
from megatron_rw.training.settings import Settings


def check_bad_numbers(settings: Settings) -> None:
    """Refuses what contradicts --on-nonfinite and --loss-spike-factor, or would do nothing."""
    args, policy = settings.megatron, settings.nonfinite.on_nonfinite
    if policy != "raise" and not args.check_for_nan_in_loss_and_grad:
        raise UserError(
            f"--on-nonfinite {policy} without Megatron's check does nothing: drop it, or "
            "--no-check-for-nan-in-loss-and-grad (or --fp16 with its dynamic loss scale, which "
            "turns the check off and skips such steps itself)."
        )
    if policy != "raise" and args.use_megatron_fsdp:
        raise UserError(
            f"--use-megatron-fsdp has a check of its own, which ends the run: drop it, or "
            f"--on-nonfinite {policy}."
        )
    if settings.nonfinite.loss_spike_factor is None:
        return
    if settings.monitoring.log_dir is None:
        raise UserError("--loss-spike-factor writes to spikes.jsonl: add --log-dir DIR.")
    if args.cuda_graph_impl == "full_iteration":
        raise UserError(
            "--cuda-graph-impl full_iteration never gives the samples' losses out of its "
            "graph: drop it, or --loss-spike-factor."
        )
