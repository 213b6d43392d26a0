"""The real program at a pace that SLURM's limits, which are in minutes, can be tested with."""

from __future__ import annotations

import os
import time

from megatron_rw.resilience.watchdog import Progress


def main() -> None:
    """Run it; every iteration takes `STEP_SECONDS` at least."""
    import pretrain_gpt_rw

    seconds = float(os.environ["STEP_SECONDS"])
    begin = Progress.begin

    def begin_later(self: Progress, iteration: int, doing: str) -> None:
        time.sleep(seconds)
        begin(self, iteration, doing)

    Progress.begin = begin_later  # type: ignore[method-assign]
    pretrain_gpt_rw.main()


if __name__ == "__main__":
    main()
