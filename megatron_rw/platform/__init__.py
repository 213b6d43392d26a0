"""Where the program runs: on CUDA as Megatron does, or on the CPU through redirects.

Megatron assumes CUDA by name, so the choice is made before Megatron is imported. On CUDA
nothing of this package changes anything after `select_device`.
"""

import argparse
import functools
import shlex
from collections.abc import Sequence
from typing import Literal, NoReturn

from megatron_rw.errors import UserError

Device = Literal["cuda", "cpu"]
_CHOICES = ("auto", "cuda", "cpu")


class FlagReader(argparse.ArgumentParser):
    """Reads some flags out of a command line, and the argument files in it.

    It has no `--help`, and a `UserError` takes the place of argparse's usage and exit.
    """

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        allow_argument_files(self)

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`."""
        raise UserError(message, known_to_all=False)


def select_device(argv: Sequence[str]) -> Device:
    """Reads `--device` from a command line without the program's name; makes that device ready.

    Must run before the first import of `megatron`. `auto` (the default) takes CUDA when a device is
    visible and the CPU otherwise. Other flags are left for Megatron's own parser.
    """
    parser = FlagReader()
    parser.add_argument("--device", default="auto")
    asked = parser.parse_known_args(argv)[0].device
    if asked not in _CHOICES:
        raise UserError(f"--device {asked}: choose one of {', '.join(_CHOICES)}.")

    import torch

    cuda_there = torch.cuda.is_available()
    if asked == "cuda" and not cuda_there:
        raise UserError(
            "--device cuda, but torch sees no CUDA device. Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or pass --device cpu.",
            known_to_all=False,
        )
    if asked == "cpu" or not cuda_there:
        from megatron_rw.platform import cpu

        cpu.activate(asked_for=asked == "cpu")
        return "cpu"
    from megatron_rw.platform.quiet import silence

    silence("cuda")
    return "cuda"


def allow_argument_files(parser: argparse.ArgumentParser) -> None:
    """Lets a parser read `@path` as the flags in that file, split as a shell would.

    A line may hold several flags; `#` begins a comment. Flags after `@path` win over those in it.
    """
    parser.fromfile_prefix_chars = "@"
    split = functools.partial(shlex.split, comments=True)
    parser.convert_arg_line_to_args = split  # type: ignore[method-assign]
