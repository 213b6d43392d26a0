"""Megatron's `--profile --use-pytorch-profiler`, for a run that was resumed."""

from __future__ import annotations

from argparse import Namespace


def count_from_here(args: Namespace) -> None:
    """Have the profiler take the steps that the flags name. Once the checkpoint is loaded.

    Megatron starts it so many steps after the resume, and stops it at the iteration of that
    number: a run that was resumed leaves no trace, or that of other steps.

    Args:
        args: `iteration` is the checkpoint's. Megatron's training loop reads them after this.
    """
    if not (args.profile and args.use_pytorch_profiler):
        return
    if args.iteration >= args.profile_step_end:
        # All of them were before.
        args.profile = False
    args.profile_step_start -= args.iteration
