"""`--prometheus-port`: which rank serves its metrics, and what is said about it."""

from __future__ import annotations

import importlib.util
import socket
from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_rw.errors import UserError

if TYPE_CHECKING:
    from megatron_rw.observability.endpoint import Endpoint

DEFAULT_ADDRESS = "127.0.0.1"


def serve(args: Namespace) -> Endpoint | None:
    """Opens the endpoint that the flags ask for, on the last rank, which has all metrics.

    Args:
        args: Validated by Megatron.

    Returns:
        The endpoint; None without --prometheus-port, and on the other ranks.

    Raises:
        UserError: If it cannot be opened, or `prometheus_client` is missing.
    """
    if args.prometheus_port is None:
        return None
    if importlib.util.find_spec("prometheus_client") is None:
        raise UserError(
            "--prometheus-port needs the package prometheus-client: pip install prometheus-client."
        )
    if args.rank != args.world_size - 1:
        return None
    from megatron_rw.observability.endpoint import Endpoint

    endpoint = Endpoint(args.prometheus_address, args.prometheus_port, args.seq_length)
    print(f"> metrics at {endpoint.url} (rank {args.rank}, {socket.gethostname()})", flush=True)
    return endpoint
