"""Files of the real program that cannot grow beyond a limit, as under a quota."""

from __future__ import annotations

import functools
import os
import resource
import sys
from typing import Any

from megatron_rw.resilience import writer


def limit(*sizes: int) -> None:
    """Limits the files of each rank, by its index, to so many bytes; 0 is no limit."""
    size = sizes[int(os.environ["RANK"])]
    if size and "--async-save" in sys.argv:
        # Not the rank: it hands its tensors over in shared memory, which is made of files.
        writer._main = functools.partial(_writer_main, size)
    elif size:
        _limit(size)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _writer_main(size: int, *args: Any) -> None:
    _limit(size)
    writer._main(*args)
