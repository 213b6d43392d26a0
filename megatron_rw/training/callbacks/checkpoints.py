"""What a run notes in its checkpoints, and a run whose checkpoint is its last."""

from __future__ import annotations

from argparse import Namespace

import torch.distributed as dist
from megatron.training import print_rank_0

from megatron_rw.training.callbacks.base import Callback


class CheckpointCallback(Callback):
    """Gives every rank the data's fingerprints, and ends a run that has nothing left to do.

    Args:
        args: Megatron's arguments, which are saved with every checkpoint.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def on_process_groups(self) -> None:
        """Shares what rank 0 alone has read of the data. Collective."""
        shared = [getattr(self._args, "data_fingerprints", None)]
        dist.broadcast_object_list(shared, src=0)
        self._args.data_fingerprints = shared[0]

    def on_loaded(self) -> None:
        """Ends the run if the checkpoint is that of its last iteration.

        Megatron would go on and fail, because there are "no samples left to consume".

        Raises:
            SystemExit: With status 0.
        """
        args = self._args
        if args.skip_train or not args.train_iters or args.iteration < args.train_iters:
            return
        print_rank_0(
            f"> nothing left to do: {args.load} holds iteration {args.iteration} of "
            f"{args.train_iters}"
        )
        raise SystemExit(0)
