"""Refuses settings for bad numbers that contradict Megatron's flags."""

from __future__ import annotations

from megatron_rw.errors import UserError
from megatron_rw.resilience.nonfinite import NonFiniteConfig


def check_bad_numbers(
    config: NonFiniteConfig,
    *,
    log_dir: str | None,
    checks: bool,
    megatron_fsdp: bool,
    cuda_graph_impl: str,
) -> None:
    """Refuses what contradicts --on-nonfinite and --loss-spike-factor, or would do nothing.

    Args:
        config: The settings, each checked by itself already.
        log_dir: The folder of our logs.
        checks: Value of --check-for-nan-in-loss-and-grad, after Megatron's validation.
        megatron_fsdp: Value of --use-megatron-fsdp.
        cuda_graph_impl: As Megatron's flag.

    Raises:
        UserError: Names the flag and the remedy.
    """
    policy = config.on_nonfinite
    if policy != "raise" and not checks:
        raise UserError(
            f"--on-nonfinite {policy} without Megatron's check does nothing: drop it, or "
            "--no-check-for-nan-in-loss-and-grad (or --fp16 with its dynamic loss scale, which "
            "turns the check off and skips such steps itself)."
        )
    if policy != "raise" and megatron_fsdp:
        raise UserError(
            f"--use-megatron-fsdp has a check of its own, which ends the run: drop it, or "
            f"--on-nonfinite {policy}."
        )
    if config.loss_spike_factor is None:
        return
    if log_dir is None:
        raise UserError("--loss-spike-factor writes to spikes.jsonl: add --log-dir DIR.")
    if cuda_graph_impl == "full_iteration":
        raise UserError(
            "--cuda-graph-impl full_iteration never gives the samples' losses out of its "
            "graph: drop it, or --loss-spike-factor."
        )
