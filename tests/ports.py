"""Ports at which the ranks of a test meet."""

from __future__ import annotations

import itertools
import os
import socket

# Below what Linux gives to connections by itself (from 32768 on): a port that is only probed for
# there may be gone before rank 0 listens at it. Every test worker has a stretch of its own.
FIRST, STRETCH = 20000, 1000

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_numbers = itertools.cycle(range(FIRST + _worker * STRETCH, FIRST + (_worker + 1) * STRETCH))


def free_port() -> int:
    """One that nothing listens at, and that no other test of the run is given."""
    for port in itertools.islice(_numbers, STRETCH):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {FIRST} on for test worker {_worker}")
