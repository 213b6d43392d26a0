"""Look at every rank before a long job.

    srun python tools/preflight.py <the flags of the job>
    torchrun --nproc-per-node 8 tools/preflight.py <the flags of the job>

Start it as the job will be started. Every rank runs the job's own checks of flags and data,
looks at its machine, tries to write to --save and forms a process group with the others, in which
GPUs run Megatron's GPU sniff test. Rank 0 prints one table and results. No model is built and no
step is taken. Clocks are not compared; `chronyc tracking` or `timedatectl` on each host does that.
Exit status 0 when the job can start, 1 when there are problems, 2 for flags that the job would
refuse; 74 when ranks lose each other.

    python tools/preflight.py --estimate 64 <the flags of the job>

prints what Megatron's formulas say about memory, work and checkpoints of a job of 64 GPUs, and
ends: nothing is started, no GPU is needed.

It was run over gloo with up to four processes of one machine; not on GPUs over NCCL yet, nor over
a network.

All flags of pretrain_gpt_rw.py are flags here too (pretrain_gpt_rw.py --help); its own are:
"""

import dataclasses
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

    room_for_checkpoints: int | None = None
    """How many checkpoints the disk of --save should hold. One more than --keep-last, or 2, by
    default."""

    estimate: int | None = None
    """Print estimates for a job of this many GPUs, and end."""

    device_memory_gib: float = 79.0
    """Memory of a GPU for --estimate; that of an H100 with 80 GB by default."""

    peak_tflops: float | None = None
    """Peak of a GPU in TFLOP/s, for estimates of time. By default that of an H100 SXM by its data
    sheet: 989 in 16 bits, 67 in fp32."""

    assumed_mfu: float = 0.4
    """Model FLOPs utilisation assumed for estimates of time, from 0 to 1. It was not measured."""

    def __post_init__(self) -> None:
        for name in (
            *("wait_seconds", "room_for_checkpoints", "estimate"),
            *("device_memory_gib", "peak_tflops", "assumed_mfu"),
        ):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(value is None or value > 0, flag, value, "a number above 0")
        require(self.assumed_mfu <= 1, "--assumed-mfu", self.assumed_mfu, "a number from 0 to 1")
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

        if settings.estimate is None:
            sys.exit(look(settings, flags, device))
        sys.exit(_print_estimate(settings, flags, settings.estimate))


def _print_estimate(settings: PreflightConfig, flags: list[str], gpus: int) -> int:
    from megatron_rw.observability.memory import remedies
    from megatron_rw.platform.files import write_json
    from megatron_rw.preflight.estimate import estimate, planned_arguments
    from megatron_rw.preflight.facts import GIB
    from megatron_rw.preflight.rank import PROBLEMS

    args = planned_arguments(flags, gpus)
    needed = estimate(args)
    if needed is None:
        print("Megatron has no formulas for a hybrid model.")
        return 0
    print(*needed.lines(settings), sep="\n")
    if settings.json is not None:
        write_json(settings.json, {"estimate": dataclasses.asdict(needed)})
    if needed.memory_bytes <= settings.device_memory_gib * GIB:
        return 0
    print(
        f"problem: more than the {settings.device_memory_gib:g} GiB of a GPU "
        f"(--device-memory-gib). Lower it with {remedies(args)}."
    )
    return PROBLEMS
