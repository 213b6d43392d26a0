"""Saves the reweighting state in the checkpoints of `megatron.training`."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.training import checkpointing, print_rank_0

from megatron_rw.integrations.state import ReweightState
from megatron_rw.patching import Around, Patch


def patches(state: ReweightState, args: Namespace) -> list[Patch]:
    """Returns what saves the state with every checkpoint, and loads it on a resume.

    The state travels in Megatron's arguments, `args`; see `ReweightState.keep_in`.
    """

    def save(proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
        state.keep_in(args)
        return proceed()

    def load(proceed: Callable[..., Any], call: dict[str, Any]) -> None:
        proceed()
        for line in state.resume(call["checkpoint_args"]):
            print_rank_0(f"> {line}")

    saves = "It is called for every checkpoint, on every rank, and puts the arguments into it."
    loads = "load_checkpoint gives it the saved arguments, whatever the checkpoint's format."
    return [
        Patch(checkpointing, "generate_state_dict", Around(save), saves),
        Patch(checkpointing, "check_checkpoint_args", Around(load), loads),
    ]
