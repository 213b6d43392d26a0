"""Look at every rank before a long job.

    srun python tools/preflight.py <the flags of the job>
    torchrun --nproc-per-node 8 tools/preflight.py <the flags of the job>

Start it as the job will be started. Every rank runs the job's own checks of flags and data,
looks at its machine, tries to write to --save and forms a process group with the others, in which
GPUs run Megatron's GPU sniff test. Rank 0 prints one table and results. No model is built and no
step is taken: the table has free disk space and free memory, and whether they are enough is not
judged. Clocks are not compared; `chronyc tracking` or `timedatectl` on each host does that.
Exit status 0 when the job can start, 1 when there are problems, 2 for flags that the job would
refuse; 74 when ranks lose each other.

It was run over gloo with up to four processes of one machine; not on GPUs over NCCL yet, nor over
a network.

All flags of pretrain_gpt_rw.py are flags here too (pretrain_gpt_rw.py --help); its own are:
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_rw.command_line import parse_known, require
from megatron_rw.errors import UserError, reported
from megatron_rw.platform import select_device
from megatron_rw.platform.launch import prepare_process


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What the preflight itself is told."""

    json: Path | None = None
    """Write all that was found to this file, as one JSON object."""

    wait_seconds: int = 300
    """How long to wait for a rank to arrive, or for the collectives to end, before the ranks that
    keep the others waiting are named."""

    def __post_init__(self) -> None:
        require(self.wait_seconds > 0, "--wait-seconds", self.wait_seconds, "a number above 0")
        if self.json is not None and not self.json.parent.is_dir():
            raise UserError(f"--json {self.json}: there is no such folder.")


def main() -> None:
    """Run the tool."""
    argv = sys.argv[1:]
    with reported("checking a job before it starts", alike=True):
        prepare_process()
        settings, flags = parse_known(PreflightConfig, argv, __doc__)
        device = select_device(argv)

        # It imports Megatron, which has to wait until the device is chosen.
        from megatron_rw.preflight.rank import look

        sys.exit(look(settings, flags, device))
