"""The command line of a tool that takes the flags of a job beside its own."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron.training import global_vars

from megatron_rw import patching
from megatron_rw.errors import UserError
from megatron_rw.patching import Patch
from megatron_rw.platform import Device
from megatron_rw.training.arguments import parse_args
from megatron_rw.training.settings import Settings


class ToolParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print the usage on every rank."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(message)


def parse_job_flags(flags: Sequence[str], device: Device) -> Settings:
    """Parse, check and validate the flags of a job, without its logs.

    Args:
        flags: its command line.
        device: what `platform.select_device` chose.

    Raises:
        UserError: For what the job would refuse.
    """
    # They are set up while arguments are parsed; a tool is no run to be logged.
    writers = ("_set_tensorboard_writer", "_set_wandb_writer", "_set_one_logger")
    why = "Megatron opens them while it parses arguments."
    patching.apply([Patch(global_vars, name, lambda args: None, why) for name in writers])
    sys.argv = [sys.argv[0], *flags]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return parse_args(device)
    finally:
        # But for the list of all arguments.
        for line in said.getvalue().splitlines():
            if line.startswith(("WARNING", "> ")):
                print(line, flush=True)
