"""`--prometheus-port`: which rank serves its metrics, and what is said about it."""

from __future__ import annotations

import importlib.util
import socket
from typing import TYPE_CHECKING

from megatron_rw.errors import UserError
from megatron_rw.observability.config import MonitoringConfig

if TYPE_CHECKING:
    # It imports `prometheus_client`, which is optional.
    from megatron_rw.observability.endpoint import Endpoint


def serve(config: MonitoringConfig, rank: int, world_size: int, seq_length: int) -> Endpoint | None:
    """Opens the endpoint that the flags ask for, on the last rank, which has all metrics.

    Returns:
        The endpoint; None without --prometheus-port, and on the other ranks.

    Raises:
        UserError: If it cannot be opened, or `prometheus_client` is missing.
    """
    if config.prometheus_port is None:
        return None
    if importlib.util.find_spec("prometheus_client") is None:
        raise UserError(
            "--prometheus-port needs the package prometheus-client: pip install prometheus-client."
        )
    if rank != world_size - 1:
        return None
    from megatron_rw.observability.endpoint import Endpoint

    endpoint = Endpoint(config.prometheus_address, config.prometheus_port, seq_length)
    print(f"> metrics at {endpoint.url} (rank {rank}, {socket.gethostname()})", flush=True)
    return endpoint
