"""Megatron's `--profile --use-pytorch-profiler` in a run that was resumed."""

from __future__ import annotations

from argparse import Namespace

from megatron_rw.training.callbacks.base import Callback


class ProfileCallback(Callback):
    """Makes the profiler record the iterations that the flags name.

    Megatron counts --profile-step-start from the resume and --profile-step-end from iteration 0, so
    that a resumed run would leave no trace, or one of other steps. Its training loop reads the
    arguments after `on_loaded`.
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
