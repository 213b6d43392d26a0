"""Megatron's `--profile --use-pytorch-profiler` in a run that was resumed."""

from __future__ import annotations

from argparse import Namespace

from megatron_rw.training.callbacks.base import Callback


class ProfileCallback(Callback):
    """Has the profiler take the steps that the flags name.

    Megatron starts it that many steps after the resume, and stops it at the iteration of that
    number, so that a resumed run leaves no trace, or that of other steps.

    Args:
        args: Megatron's arguments; its training loop reads them after `on_loaded`.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def on_loaded(self) -> None:
        """Counts the steps from the checkpoint's iteration."""
        args = self._args
        if not (args.profile and args.use_pytorch_profiler):
            return
        if args.iteration >= args.profile_step_end:
            # Every profiled step precedes the resume point.
            args.profile = False
        args.profile_step_start -= args.iteration
