"""A queue whose items stay pickled on their way."""

from __future__ import annotations

import pickle
from typing import Any


class SealedQueue:
    """Passes items through another queue as bytes.

    The process of a `multiprocessing.Manager` unpickles what is put into its queues, and imports
    torch to do so. A rank that saves would wait for that.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())
