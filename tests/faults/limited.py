"""The real program, with files that cannot grow beyond a limit, as under a quota."""

from __future__ import annotations

import os
import resource


def main() -> None:
    """Run it; RANK_LIMITS has the bytes of each rank, 0 for no limit."""
    limit = int(os.environ["RANK_LIMITS"].split(",")[int(os.environ["RANK"])])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    import pretrain_gpt_rw

    pretrain_gpt_rw.main()
