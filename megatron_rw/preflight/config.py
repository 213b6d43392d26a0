"""The preflight's own flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rw.command_line import require
from megatron_rw.errors import UserError


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
