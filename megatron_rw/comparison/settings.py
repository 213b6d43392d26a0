"""The settings of a comparison, from which flags, help and checks are made."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_rw.command_line import require

PairBy = Literal["seed", "order"]


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

    pair_by: PairBy = "seed"
    """seed: an arm's run is compared with the baseline's run of the same trunk, the checkpoint in
    --load, and the same --seed. order: with the one at the same place in the order of paths, for
    runs of an older program, which have no arguments.json."""

    def __post_init__(self) -> None:
        holds = self.margin > 0 and math.isfinite(self.margin)
        require(holds, "--margin", self.margin, "a finite number above 0, in nats")
