"""The settings of a comparison, from which flags, help and checks are made."""

import math
from dataclasses import dataclass

from megatron_rw.command_line import require


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How arms are compared."""

    baseline: str = "none"
    """The arm that the others are compared with."""

    margin: float = 0.005
    """A difference of less than this many nats per token does not matter: the arms are
    equivalent."""

    noise_domains: str = "noise*"
    """Glob of the domains that cannot be learnt. The verdict is on the mean loss of the others."""

    def __post_init__(self) -> None:
        holds = self.margin > 0 and math.isfinite(self.margin)
        require(holds, "--margin", self.margin, "a finite number above 0, in nats")
