"""Worker processes, which end when their parent does, and the number of cores for them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

from megatron_rw.errors import UserError

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Returns how many cores this process may use: its affinity, or a container's quota if less."""
    cores = len(os.sched_getaffinity(0))
    if _QUOTA.is_file():
        quota, period = _QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def run_unordered[Task, Result](
    function: Callable[[Task], Result], tasks: Iterator[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Runs a function over tasks in worker processes and yields results in the order they come.

    Only a few tasks more than there are workers are taken at a time. Tasks and results must be
    picklable; the function need not, since workers inherit it. With one worker, no process is
    started. Raises a `UserError` if a worker process was killed. What the function raises is passed
    on.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    # By fork, so that what the function holds and the imported modules are shared. The pool starts
    # all of its processes at the first submit, before it starts a thread.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _start_worker, (function,)
    )
    running: dict[Future[Result], Task] = {}
    try:
        for task in tasks:
            running[pool.submit(_call, task)] = task
            if len(running) >= workers + 2 + workers // 4:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished[Task, Result](running: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


_function: Callable[..., Any]


def _start_worker(function: Callable[..., Any]) -> None:
    global _function
    _function = function
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when the parent is gone, even by SIGKILL; the pool itself would hang."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _call(task: Any) -> Any:
    return _function(task)
