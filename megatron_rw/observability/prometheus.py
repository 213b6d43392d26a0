"""`--prometheus-port`: which rank serves its metrics, and what is said about it."""

from __future__ import annotations

import importlib.util
import socket
from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_rw.errors import UserError
from megatron_rw.observability.config import MonitoringConfig

if TYPE_CHECKING:
    from megatron_rw.observability.endpoint import Endpoint


def serve(config: MonitoringConfig, args: Namespace) -> Endpoint | None:
    """Opens the endpoint that the flags ask for, on the last rank, which has all metrics.

    Args:
        config: The flags.
        args: Megatron's arguments.

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
    if args.rank != args.world_size - 1:
        return None
    from megatron_rw.observability.endpoint import Endpoint

    endpoint = Endpoint(config.prometheus_address, config.prometheus_port, args.seq_length)
    print(f"> metrics at {endpoint.url} (rank {args.rank}, {socket.gethostname()})", flush=True)
    return endpoint
