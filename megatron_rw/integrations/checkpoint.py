"""Reweighting state in the checkpoints of `megatron.training`."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

from megatron.training import checkpointing, print_rank_0

from megatron_rw.integrations.state import ReweightState


def keep_in_checkpoints(state: ReweightState, args: Namespace) -> None:
    """Save `state` with every checkpoint of the run and take it back on a resume.

    Args:
        state: the same on every rank.
        args: Megatron's, before `pretrain`.
    """
    state.keep_in(args)
    # load_checkpoint hands the saved arguments to it, whatever the checkpoint's format.
    original = checkpointing.check_checkpoint_args

    @functools.wraps(original)
    def check(checkpoint_args: Namespace, *rest: Any, **named: Any) -> Any:
        result = original(checkpoint_args, *rest, **named)
        for line in state.resume(checkpoint_args):
            print_rank_0(f"> {line}")
        return result

    checkpointing.check_checkpoint_args = check
