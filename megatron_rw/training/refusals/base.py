"""The form of a refusal of flags: a table of what cannot be, and why."""

from argparse import Namespace
from collections.abc import Mapping

from megatron_rw.errors import UserError

# Flags whose name is not that of their argument.
_NAMES = {"gtp_weight_remat_size": "--tensor-parallel-num-weight-shards"}
# Arguments that are in use when they are above 1.
_SIZES = ("gtp_weight_remat_size", "context_parallel_size")


def flag(name: str) -> str:
    """The flag of an argument, `--save-interval` of `save_interval`."""
    return _NAMES.get(name, "--" + name.replace("_", "-"))


def refuse_flags(args: Namespace, why: Mapping[str, str], remedy: str) -> None:
    """Refuses the first flag of a table that is in use.

    By the name of its argument, `why` says what the flag does that cannot be, as it follows the
    flag's name in the message; `remedy`, without a full stop, what to do instead.
    """
    for name, reason in why.items():
        value = getattr(args, name, None)
        if value and (name not in _SIZES or value > 1):
            raise UserError(f"{flag(name)} {reason}: {remedy}.")
