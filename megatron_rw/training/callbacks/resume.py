"""Records the data in checkpoints, and fits a run to the iteration that it begins with."""

from argparse import Namespace

import torch.distributed as dist
from megatron.training import print_rank_0

from megatron_rw.training.callbacks.base import Callback


class ResumeCallback(Callback):
    """Gives every rank the data's fingerprints, and fits the run to the iteration it begins with.

    The fingerprints are kept in Megatron's arguments, which are saved with every checkpoint.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def on_process_groups(self) -> None:
        """Broadcasts the fingerprints, which only rank 0 has read. Collective."""
        shared = [getattr(self._args, "data_fingerprints", None)]
        dist.broadcast_object_list(shared, src=0)
        self._args.data_fingerprints = shared[0]

    def on_loaded(self) -> None:
        """Ends the run, with status 0, if the checkpoint is that of its last iteration.

        Megatron would go on and fail, because there are "no samples left to consume".
        """
        args = self._args
        if not (args.skip_train or not args.train_iters or args.iteration < args.train_iters):
            print_rank_0(
                f"> nothing left to do: {args.load} holds iteration {args.iteration} of "
                f"{args.train_iters}; raise --train-iters to train longer"
            )
            raise SystemExit(0)
        if args.profile and args.use_pytorch_profiler:
            # Megatron counts --profile-step-start from the resume and --profile-step-end from
            # iteration 0, so that a resumed run would leave no trace, or one of other steps.
            args.profile = args.iteration < args.profile_step_end
            args.profile_step_start -= args.iteration
