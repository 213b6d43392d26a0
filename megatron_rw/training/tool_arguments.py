"""The flags of a job, as a tool takes them beside its own."""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from megatron.training import global_vars

from megatron_rw.errors import UserError
from megatron_rw.platform import Device
from megatron_rw.training.arguments import explain, parse_args


def parse_job_flags(flags: Sequence[str], device: Device) -> Namespace:
    """Parses, checks and validates the flags of a job, without setting up the job's logs.

    Args:
        flags: The job's command line without the program's name.
        device: What `platform.select_device` chose.

    Raises:
        UserError: What the job would refuse.
        OSError: A file of the job cannot be read.
    """
    # Megatron sets up the job's logs while it parses; a tool must not write to them.
    for writer in ("_set_tensorboard_writer", "_set_wandb_writer", "_set_one_logger"):
        setattr(global_vars, writer, lambda args: None)
    sys.argv = [sys.argv[0], *flags]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), refusals_as_user_errors():
            return parse_args(device)
    finally:
        # Megatron's list of all arguments is left out.
        for line in said.getvalue().splitlines():
            if line.startswith(("WARNING", "> ")):
                print(line, flush=True)


@contextlib.contextmanager
def refusals_as_user_errors() -> Iterator[None]:
    """Raises a `UserError` in place of what Megatron raises when it refuses flags."""
    try:
        yield
    except (AssertionError, ValueError) as refusal:
        raise UserError(explain(refusal)) from refusal
