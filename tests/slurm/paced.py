"""The real program at a pace that SLURM's limits, which are in minutes, can be tested with.

Every iteration takes STEP_SECONDS at least.
"""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

import pretrain_gpt_rw
from megatron_rw.resilience.watchdog import Progress

_begin = Progress.begin


def begin_later(progress: Any, iteration: int, doing: str) -> None:
    time.sleep(float(os.environ["STEP_SECONDS"]))
    _begin(progress, iteration, doing)


if __name__ == "__main__":
    with mock.patch.object(Progress, "begin", begin_later):
        pretrain_gpt_rw.main()
