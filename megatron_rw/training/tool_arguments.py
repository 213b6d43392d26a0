"""The flags of a job, as a tool takes them beside its own."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

from megatron.training import global_vars

from megatron_rw import patching
from megatron_rw.patching import Patch
from megatron_rw.platform import Device
from megatron_rw.training.arguments import parse_args
from megatron_rw.training.settings import Settings


def parse_job_flags(flags: Sequence[str], device: Device) -> Settings:
    """Parses, checks and validates the flags of a job, without setting up the job's logs."""
    why = "Megatron sets up the job's logs while it parses, and a tool must not write to them."
    writers = ("_set_tensorboard_writer", "_set_wandb_writer", "_set_one_logger")
    patching.apply([Patch(global_vars, name, lambda args: None, why) for name in writers])
    sys.argv = [sys.argv[0], *flags]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return parse_args(device)
    finally:
        # Megatron's list of all arguments is left out.
        for line in said.getvalue().splitlines():
            if line.startswith(("WARNING", "> ")):
                print(line, flush=True)
