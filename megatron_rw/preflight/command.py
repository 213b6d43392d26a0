"""Look at every rank before a long job.

    srun python tools/preflight.py <the flags of the job>
    torchrun --nproc-per-node 8 tools/preflight.py <the flags of the job>

Start it as the job will be started. Every rank runs the job's own checks of flags and data,
looks at its machine, tries to write to --save, compares clocks and measures all-reduces. Rank 0
prints one table and verdicts. No model is built and no step is taken. Exit status 0 when the job
can start, 1 when there are problems, 2 for flags that the job would refuse; 74 when ranks lose
each other.

    python tools/preflight.py --estimate 64 <the flags of the job>

prints what Megatron's formulas say about memory, work and checkpoints of a job of 64 GPUs, and
ends: nothing is started, no GPU is needed.

It was run over gloo with up to four processes of one machine; not on GPUs over NCCL yet, nor over
a network.

All flags of pretrain_gpt_rw.py are flags here too (pretrain_gpt_rw.py --help); its own are:
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_rw.errors import UserError, reported
from megatron_rw.platform import select_device
from megatron_rw.platform.launch import prepare_process

if TYPE_CHECKING:
    # It imports Megatron, which has to wait until the device is chosen.
    from megatron_rw.preflight.config import PreflightConfig


def main() -> None:
    """Run the tool."""
    argv = sys.argv[1:]
    try:
        prepare_process()
        device = select_device(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    from megatron_rw.preflight.config import job_arguments, planned_arguments, split_flags
    from megatron_rw.preflight.rank import look

    with reported("reading the arguments"):
        config, flags = split_flags(argv, __doc__)
        if config.estimate is not None:
            sys.exit(_plan(config, planned_arguments(flags, config.estimate)))
    args: Namespace | None = None
    refusal: str | None = None
    try:
        args = job_arguments(flags, device)
    except (UserError, OSError) as error:
        # The ranks meet even so: what one alone refuses should be heard.
        refusal = str(error)
    sys.exit(look(config, device, args, refusal))


def _plan(config: PreflightConfig, args: Namespace) -> int:
    from megatron_rw.preflight.estimate import advice, estimate
    from megatron_rw.preflight.facts import GIB
    from megatron_rw.preflight.rank import PROBLEMS, write_json

    needed = estimate(args)
    if needed is None:
        print("Megatron has no formulas for a hybrid model.")
        return 0
    for line in needed.lines(needed.hours_text(config.peak_tflops, config.assumed_mfu)):
        print(line)
    if config.json is not None:
        write_json(config.json, {"estimate": dataclasses.asdict(needed)})
    if needed.memory_bytes <= config.device_memory_gib * GIB:
        return 0
    print(
        f"problem: more than the {config.device_memory_gib:g} GiB of a GPU (--device-memory-gib). "
        f"Lower it with {advice(args)}."
    )
    return PROBLEMS
