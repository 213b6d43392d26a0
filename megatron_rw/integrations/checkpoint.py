"""What a checkpoint of `megatron.training` has and loads beside Megatron's own."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys
from megatron.training import checkpointing, print_rank_0

from megatron_rw.integrations.state import ReweightState
from megatron_rw.patching import Around, Patch

# What tells groups of parameters from each other, but for the rates, which may change on a resume.
_GROUP_KEYS = [key for key in param_group_identifier_keys if key not in ("max_lr", "min_lr")]


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

    def load_optimizer(proceed: Callable[..., Any], call: dict[str, Any]) -> None:
        if args.override_opt_param_scheduler:
            take_rates(call["self"].param_groups, call["state_dict"])
        proceed()

    saves = "It is called for every checkpoint, on every rank, and puts the arguments into it."
    loads = "load_checkpoint gives it the saved arguments, whatever the checkpoint's format."
    return [
        Patch(checkpointing, "generate_state_dict", Around(save), saves),
        Patch(checkpointing, "check_checkpoint_args", Around(load), loads),
        Patch(
            ChainedOptimizer,
            "load_state_dict",
            Around(load_optimizer),
            "With another --lr or --min-lr, Megatron does not find a checkpoint's groups of "
            "parameters, and --override-opt_param-scheduler cannot do what it is for.",
        ),
    ]


def take_rates(groups: Sequence[dict[str, Any]], saved: Any) -> None:
    """Gives the groups in an optimizer's saved state the rates of the same groups of this run.

    Groups are the same if all else agrees by which Megatron tells them apart. The state is that of
    one optimizer or of several in a list or dictionary.
    """
    given = {tuple(group.get(key) for key in _GROUP_KEYS): group for group in groups}
    parts = list(saved.values()) if isinstance(saved, dict) else saved
    for group in saved.get("param_groups", []) if isinstance(saved, dict) else []:
        mine = given.get(tuple(group.get(key) for key in _GROUP_KEYS), {})
        group |= {key: mine[key] for key in ("max_lr", "min_lr") if key in mine}
    for part in parts:
        if isinstance(part, dict | list):
            take_rates(groups, part)
