"""Ports at which the ranks of a test meet."""

from __future__ import annotations

import random
import socket

# Below what Linux gives to connections by itself (from 32768 on): a port that is only probed for
# there may be gone before rank 0 listens at it.
PORTS = range(20000, 32000)

# Workers and other runs of the tests on this machine begin elsewhere.
_next = random.SystemRandom().randrange(len(PORTS))


def free_port() -> int:
    """One that nothing listens at, and that this process has not given to another test lately."""
    global _next
    for _ in PORTS:
        port = PORTS[_next % len(PORTS)]
        _next += 1
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port of {PORTS} is free")
