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
    # Called for every checkpoint that is saved, on every rank, and puts `args` into it.
    generate = checkpointing.generate_state_dict

    @functools.wraps(generate)
    def generate_state_dict(*given: Any, **named: Any) -> Any:
        state.keep_in(args)
        return generate(*given, **named)

    # load_checkpoint hands the saved arguments to it, whatever the checkpoint's format.
    check = checkpointing.check_checkpoint_args

    @functools.wraps(check)
    def check_checkpoint_args(checkpoint_args: Namespace, *given: Any, **named: Any) -> Any:
        result = check(checkpoint_args, *given, **named)
        for line in state.resume(checkpoint_args):
            print_rank_0(f"> {line}")
        return result

    checkpointing.generate_state_dict = generate_state_dict
    checkpointing.check_checkpoint_args = check_checkpoint_args
