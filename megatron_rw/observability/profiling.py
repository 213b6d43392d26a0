"""Corrects Megatron's `--profile --use-pytorch-profiler` for a run that was resumed."""

from __future__ import annotations

from argparse import Namespace


def count_from_here(args: Namespace) -> None:
    """Lets the profiler record the steps that the flags name, after the checkpoint is loaded.

    Megatron counts --profile-step-start from the resume and --profile-step-end from iteration 0: a
    run that was resumed leaves no trace, or that of other steps.

    Args:
        args: Megatron's arguments, which its training loop reads after this; `iteration` is the
            checkpoint's.
    """
    if not (args.profile and args.use_pytorch_profiler):
        return
    if args.iteration >= args.profile_step_end:
        # Every profiled step precedes the resume point.
        args.profile = False
    args.profile_step_start -= args.iteration
