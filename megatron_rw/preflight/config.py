"""The preflight's own flags, and those of the job."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.training.argument_utils import (
    ArgumentGroupFactory,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)

from megatron_rw.errors import UserError
from megatron_rw.platform import Device
from megatron_rw.platform.argfile import allow_argument_files
from megatron_rw.training.arguments import resolve_annotations
from megatron_rw.training.datasets import Domains
from megatron_rw.training.tool_arguments import ToolParser, parse_job_flags


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What the preflight itself is told."""

    json: str | None = None
    """Write all that was found to this file, as one JSON object."""

    wait_seconds: int = 300
    """How long to wait for a rank to arrive, or for a measurement to end, before those that keep
    the others waiting are named."""

    room_for_checkpoints: int | None = None
    """How many checkpoints the disk of --save should hold. One more than --keep-last, or 2, by
    default."""

    estimate: int | None = None
    """Print estimates for a job of this many GPUs, and end."""

    device_memory_gib: float = 79.0
    """Memory of a GPU for --estimate; that of an H100 with 80 GB by default."""

    peak_tflops: float | None = None
    """Of a GPU, for estimates of time. By default those of an H100 SXM by its data sheet: 989 in
    16 bits, 67 in fp32."""

    assumed_mfu: float = 0.4
    """Model FLOPs utilisation assumed for estimates of time, from 0 to 1. It was not measured."""


def split_flags(argv: Sequence[str], description: str) -> tuple[PreflightConfig, list[str]]:
    """Take the preflight's own flags from a command line.

    Args:
        argv: without the program's name.
        description: for --help.

    Returns:
        They, and the job's flags.

    Raises:
        UserError: one cannot be.
    """
    parser = ToolParser(
        prog="preflight.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    resolve_annotations(PreflightConfig)
    ArgumentGroupFactory(PreflightConfig).build_group(parser, "preflight")
    allow_argument_files(parser)
    own, rest = parser.parse_known_args(argv)
    config = PreflightConfig(**vars(own))
    for name in ("wait_seconds", "room_for_checkpoints", "estimate", "device_memory_gib"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
    if not 0 < config.assumed_mfu <= 1:
        raise UserError(f"--assumed-mfu must be above 0 and at most 1, not {config.assumed_mfu}.")
    if config.peak_tflops is not None and config.peak_tflops <= 0:
        raise UserError(f"--peak-tflops must be above 0, not {config.peak_tflops}.")
    if config.json is not None and not os.path.isdir(os.path.dirname(config.json) or "."):
        raise UserError(f"--json {config.json}: there is no such folder.")
    return config, rest


def job_arguments(flags: Sequence[str], device: Device) -> Namespace:
    """The job's arguments, after all checks that it makes itself before it starts.

    Args:
        flags: its command line.
        device: what `platform.select_device` chose.

    Raises:
        UserError: For what the job would refuse.
    """
    args = parse_job_flags(flags, device).megatron
    pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    Domains(args)
    return args


def planned_arguments(flags: Sequence[str], gpus: int) -> Namespace:
    """The arguments of a job of that many GPUs, on a machine that need not have any.

    Args:
        flags: its command line.
        gpus: one process each.

    Raises:
        UserError: For what the job would refuse.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus)}
    # Megatron's default, which ours gives up where Transformer Engine is not installed.
    return parse_job_flags(["--transformer-impl", "transformer_engine", *flags], "cuda").megatron
