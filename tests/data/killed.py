"""Runs preprocess_data, and kills it when it reaches a point.

    KILL='{"point": "rename", "count": 3, "who": "group"}' python -m tests.data.killed --input ...

The point is `part` (a worker has written a part that has no name yet), `join` (between two pieces
of the joined datasets), `rename` (before and after each rename to a final name) or `cleanup` (while
the finished work is removed), and is passed `count` times before; or it is `time`, and comes after
`count` milliseconds. `who` is killed: the process itself (`worker`), the one that all workers have
as parent (`parent`), or all (`group`). The path of every part that is completed goes to the file
`PARTS_LOG`, a line each.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rw.data import preprocess_data
from megatron_rw.data.indexed.domains import FILE_NAME
from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.data.resume import FOLDER


def trap_of(point: str, count: int, who: str) -> Callable[[str], None]:
    """Returns a function that is told of every point, and kills at the chosen one."""
    main, left = os.getpid(), count

    def reached(passed: str) -> None:
        nonlocal left
        left -= passed == point
        if left < 0 and who == "group":
            os.killpg(0, signal.SIGKILL)
        elif left < 0:
            os.kill(main if who == "parent" else os.getpid(), signal.SIGKILL)

    if point == "time":
        left = 0
        timer = threading.Timer(count / 1000, reached, ("time",))
        timer.daemon = True
        timer.start()
    return reached


def watch(reached: Callable[[str], None], log: Path) -> None:
    """Has a trap told of every point, and every completed part written to a file."""
    rename, unlink, add_documents = Path.replace, os.unlink, PairWriter.add_documents
    main, published = os.getpid(), False

    def replace(path: Path, target: Any) -> Path:
        nonlocal published
        is_part = Path(target).suffix == ".npz"
        is_final = os.getpid() == main and FOLDER not in Path(target).parts
        point = "part" if is_part else "rename" if is_final else ""
        reached(point)
        renamed = rename(path, target)
        if is_part:
            with log.open("a") as file:
                file.write(f"{renamed}\n")
        else:
            reached(point)
        published = published or renamed.name == FILE_NAME
        return renamed

    def remove(path: Any, *, dir_fd: int | None = None) -> None:
        if published and os.getpid() == main:
            reached("cleanup")
        unlink(path, dir_fd=dir_fd)

    def add(*arguments: Any) -> None:
        add_documents(*arguments)
        reached("join")

    Path.replace = replace  # type: ignore[method-assign, assignment]
    os.unlink = remove
    PairWriter.add_documents = add  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    watch(trap_of(**json.loads(os.environ["KILL"])), Path(os.environ["PARTS_LOG"]))
    preprocess_data.main()
