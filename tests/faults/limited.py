"""The real program, with files that cannot grow beyond a limit, as under a quota."""

from __future__ import annotations

import functools
import os
import resource
import sys
from typing import Any


def main() -> None:
    """Run it; RANK_LIMITS has the bytes of each rank, 0 for no limit."""
    limit = int(os.environ["RANK_LIMITS"].split(",")[int(os.environ["RANK"])])
    if limit and "--async-save" in sys.argv:
        from megatron_rw.resilience import writer

        # Not the rank: it hands its tensors over in shared memory, which is made of files.
        writer._main = functools.partial(_writer_main, limit)
    elif limit:
        _limit(limit)
    import pretrain_gpt_rw

    pretrain_gpt_rw.main()


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _writer_main(limit: int, *args: Any) -> None:
    from megatron_rw.resilience import writer

    _limit(limit)
    writer._main(*args)
