"""The settings of a run's metrics."""

import importlib.util
import socket
from dataclasses import dataclass

from megatron_rw.errors import UserError

DEFAULT_ADDRESS = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class MonitoringConfig:
    """What a run writes and serves beside Megatron's own logs."""

    log_dir: str | None = None
    """Write metrics.jsonl here: one object per logged step and per validation."""

    prometheus_port: int | None = None
    """Serve the newest metrics for Prometheus at this port of the last rank's host, under /metrics;
    0 takes one that is free. The rank says where when it starts. Off by default."""

    prometheus_address: str = DEFAULT_ADDRESS
    """Address that --prometheus-port listens at. By default nothing outside the host reaches it;
    0.0.0.0 lets every machine of the network read the metrics, with no password."""

    log_logit_scale: bool = False
    """At validation, fit the factor on the logits that makes the loss lowest, and log both. Above
    1, the predictions are too flat. It costs about one more pass over the logits."""

    def __post_init__(self) -> None:
        if self.prometheus_port is None:
            if self.prometheus_address != DEFAULT_ADDRESS:
                raise UserError("--prometheus-address does nothing alone: add --prometheus-port.")
            return
        if not 0 <= self.prometheus_port <= 65535:
            raise UserError(
                f"--prometheus-port must be in [0, 65535], not {self.prometheus_port}: 0 takes one "
                "that is free."
            )
        if importlib.util.find_spec("prometheus_client") is None:
            raise UserError(
                f"--prometheus-port needs a package that is not installed on "
                f"{socket.gethostname()}: pip install prometheus-client",
                known_to_all=False,
            )
