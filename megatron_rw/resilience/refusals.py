"""What cannot be asked of a run's handling of bad numbers, with the remedy."""

from __future__ import annotations

import math
from argparse import Namespace

from megatron_rw.errors import UserError


def check_bad_numbers(args: Namespace) -> None:
    """Refuse what contradicts --on-nonfinite and --loss-spike-factor, or would not be exact.

    Args:
        args: validated by Megatron.

    Raises:
        UserError: names the flag and the remedy.
    """
    policy, most = args.on_nonfinite, args.max_consecutive_skips
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
    if most is not None and most < 1:
        raise UserError(
            f"--max-consecutive-skips must be 1 or more, not {most}: to end "
            "the run at the first bad step, use --on-nonfinite raise."
        )
    if policy == "raise" and most is not None:
        raise UserError("--max-consecutive-skips without --on-nonfinite skip-step does nothing.")
    factor = args.loss_spike_factor
    if factor is not None:
        if not (math.isfinite(factor) and factor > 1):
            raise UserError(f"--loss-spike-factor must be a finite number above 1, not {factor}.")
        if args.log_dir is None:
            raise UserError("--loss-spike-factor writes to spikes.jsonl: add --log-dir DIR.")
        if args.cuda_graph_impl == "full_iteration":
            raise UserError(
                "--cuda-graph-impl full_iteration never gives the samples' losses out of its "
                "graph: drop it, or --loss-spike-factor."
            )
