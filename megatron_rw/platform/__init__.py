"""Where the program runs: on CUDA as Megatron does, or on the CPU through redirects.

Megatron assumes CUDA by name, so the choice is made before Megatron is imported. On CUDA
nothing of this package is touched after `select_device`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal, NoReturn

from megatron_rw.platform.argfile import allow_argument_files

Device = Literal["cuda", "cpu"]
DEVICE_CHOICES = ("auto", "cuda", "cpu")


class DeviceError(RuntimeError):
    """The device asked for cannot be used; the message names the flag and the remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DeviceError(message)


def select_device(argv: Sequence[str]) -> Device:
    """Read `--device` from a command line and make that device ready.

    Must run before the first import of `megatron`. `auto` (the default) takes CUDA when a
    device is visible and the CPU otherwise.

    Args:
        argv: the command line without the program's name. Flags other than `--device` are
            left for Megatron's own parser.

    Returns:
        The device in use.

    Raises:
        DeviceError: `--device cuda` where there is no CUDA device, an unknown device, or an
            argument file (`@path`) that cannot be read.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    allow_argument_files(parser)
    asked = parser.parse_known_args(argv)[0].device
    if asked not in DEVICE_CHOICES:
        raise DeviceError(f"--device {asked}: choose one of {', '.join(DEVICE_CHOICES)}.")

    import torch

    cuda_there = torch.cuda.is_available()
    if asked == "cuda" and not cuda_there:
        raise DeviceError(
            "--device cuda, but torch sees no CUDA device. Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or pass --device cpu."
        )
    if asked == "cpu" or not cuda_there:
        from megatron_rw.platform import cpu

        cpu.activate(asked_for=asked == "cpu")
        return "cpu"
    from megatron_rw.platform.quiet import silence

    silence("cuda")
    return "cuda"
