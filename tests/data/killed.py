"""Runs tools/preprocess_data.py as it is, and kills it when it reaches a point.

    KILL='{"point": "rename", "count": 3, "who": "group"}' python -m tests.data.killed --input ...

The point is one of `POINTS`; `count` is how often it is passed before. With `PARTS_LOG` the path of
every part that is completed goes to that file, a line each.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rw.data.indexed.domains import FILE_NAME
from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.data.resume import FOLDER

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
POINTS = {
    "part": "a worker has written a part that has no name yet",
    "join": "between two pieces of the joined datasets",
    "rename": "before and after each rename to a final name",
    "cleanup": "while the finished work is removed",
}


class Trap:
    """Kills when it is reached often enough.

    Args:
        who: `worker` is the process itself, `parent` the one that the workers have, `group` all.
        count: how often it is reached before.
    """

    def __init__(self, who: str, count: int) -> None:
        self._who = who
        self._left = count
        self._main = os.getpid()

    def reached(self) -> None:
        self._left -= 1
        if self._left >= 0:
            return
        if self._who == "group":
            os.killpg(0, signal.SIGKILL)
        os.kill(self._main if self._who == "parent" else os.getpid(), signal.SIGKILL)


def set_trap(point: str, trap: Trap) -> None:
    """Has the trap reached at a point."""
    rename = Path.replace
    main = os.getpid()

    def part(path: Path, target: Any) -> Path:
        if Path(target).suffix == ".npz":
            trap.reached()
        return rename(path, target)

    def final(path: Path, target: Any) -> Path:
        if os.getpid() != main or FOLDER in Path(target).parts:
            return rename(path, target)
        trap.reached()
        renamed = rename(path, target)
        trap.reached()
        return renamed

    if point == "part":
        Path.replace = part  # type: ignore[method-assign, assignment]
    elif point == "rename":
        Path.replace = final  # type: ignore[method-assign, assignment]
    elif point == "join":
        PairWriter.add_documents = _after(PairWriter.add_documents, trap)  # type: ignore[method-assign]
    else:
        _trap_removal(trap)


def _after(function: Callable[..., None], trap: Trap) -> Callable[..., None]:
    def both(*arguments: Any) -> None:
        function(*arguments)
        trap.reached()

    return both


def _trap_removal(trap: Trap) -> None:
    """Has it reached at every file that is removed once a list of datasets has its final name."""
    rename, unlink = Path.replace, os.unlink
    main = os.getpid()
    done = False

    def final(path: Path, target: Any) -> Path:
        nonlocal done
        renamed = rename(path, target)
        done = done or renamed.name == FILE_NAME
        return renamed

    def removed(path: Any, *, dir_fd: int | None = None) -> None:
        if done and os.getpid() == main:
            trap.reached()
        unlink(path, dir_fd=dir_fd)

    Path.replace = final  # type: ignore[method-assign, assignment]
    os.unlink = removed


def log_parts(log: Path) -> None:
    """Has every part that is completed written to a file."""
    rename = Path.replace

    def logged(path: Path, target: Any) -> Path:
        renamed = rename(path, target)
        if renamed.suffix == ".npz":
            with log.open("a") as file:
                file.write(f"{renamed}\n")
        return renamed

    Path.replace = logged  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    if "PARTS_LOG" in os.environ:
        log_parts(Path(os.environ["PARTS_LOG"]))
    if "KILL" in os.environ:
        wanted = json.loads(os.environ["KILL"])
        set_trap(wanted["point"], Trap(wanted["who"], wanted["count"]))
    sys.argv[0] = str(TOOL)
    runpy.run_path(str(TOOL), run_name="__main__")
