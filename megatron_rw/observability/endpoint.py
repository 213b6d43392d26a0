"""The HTTP server that Prometheus fetches the newest metrics from.

The training thread leaves what it logs with the `Endpoint`, which costs it an assignment. When
somebody asks, a thread of the server turns it into text. Nothing is read from the device for that.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from megatron_rw.errors import UserError

_SKIPPED = "skipped_iterations"
# What the metrics without labels mean: this counter, and gauges.
_MEANINGS = {
    _SKIPPED: "Iterations without an update since the process began.",
    "start_time_seconds": "When the process began, Unix time.",
    "iteration": "Completed iterations.",
    "consumed_samples": "Samples trained on.",
    "consumed_tokens": "Tokens trained on.",
    "last_step_timestamp_seconds": "When the last step ended, Unix time.",
    "last_checkpoint_iteration": "Iteration of the last complete checkpoint.",
    "last_checkpoint_timestamp_seconds": (
        "When this process last completed a checkpoint, Unix time."
    ),
    "learning_rate": "Learning rate of the last step.",
    "loss_scale": "Loss scale of mixed precision.",
    "grad_norm": "Norm of the gradient before clipping.",
    "step_duration_seconds": "Duration of a step, without evaluations and checkpoints.",
    "tokens_per_second": "Tokens trained on, by all ranks.",
    "reweight_temperature": "Temperature of the last step.",
    "reweight_ess_ratio": "Effective sample size as a fraction of the set; 1 is uniform.",
    "reweight_max_weight": "Largest weight of a sample.",
    "reweight_relative_max_weight": "Largest weight times set size, mean over sets; 1 is uniform.",
    "reweight_nonfinite_samples": "Samples left out since their loss is not finite.",
}

_Samples = Sequence[tuple[Sequence[str], float]]  # The label values and the value of each sample.


class Endpoint:
    """Serves `/metrics` at its `url`, from a thread of its own.

    Raises:
        UserError: If the port is taken, or the address is not this host's. Only this rank knows.
    """

    def __init__(self, address: str, port: int, seq_length: int) -> None:
        self._seq_length = seq_length
        # Both are replaced as a whole, so that the server's threads see the old or the new ones.
        self._values: dict[str, float] = {"start_time_seconds": time.time()}
        self._records: dict[str, Mapping[str, Any]] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, address, registry)
        except OSError as error:
            raise UserError(
                f"--prometheus-port {port}: rank {os.environ.get('RANK', '0')} on "
                f"{socket.gethostname()} cannot listen at {address}: {error.strerror}. Give "
                "another port, or 0 for any that is free, and see --prometheus-address.",
                known_to_all=False,
            ) from error
        # Loaders of data and writers of checkpoints are forks. One that outlives the rank would
        # keep the port from the run that follows.
        os.register_at_fork(after_in_child=self._server.socket.close)
        host, port = self._server.server_address[:2]
        host = socket.gethostname() if host in ("0.0.0.0", "::") else str(host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def step(self, iteration: int, samples: int, skipped: bool) -> None:
        """Notes how far training is after a step, and whether the step was no update."""
        self._values = self._values | {
            _SKIPPED: self._values.get(_SKIPPED, 0) + skipped,
            "iteration": iteration,
            "consumed_samples": samples,
            "consumed_tokens": samples * self._seq_length,
            "last_step_timestamp_seconds": time.time(),
        }

    def saved(self, iteration: int) -> None:
        """Notes a complete checkpoint."""
        self._values = self._values | {
            "last_checkpoint_iteration": iteration,
            "last_checkpoint_timestamp_seconds": time.time(),
        }

    def update(self, record: Mapping[str, Any]) -> None:
        """Notes a record of metrics.jsonl, made of plain numbers; it replaces one of its type."""
        self._records = self._records | {record["type"]: record}

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics that have a value: what a collector of `prometheus_client` does."""
        values, records = self._values, self._records
        named = _by_metric(records.get("train", {})) | values
        for name, meaning in _MEANINGS.items():
            if (value := named.get(name)) is not None:
                family = CounterMetricFamily if name == _SKIPPED else GaugeMetricFamily
                yield family(f"megatron_rw_{name}", meaning, value=value)
        yield from _labelled(
            "loss",
            "Nats per token; of training, mean of an interval.",
            ("split", "loss"),
            _losses(records),
        )
        for name, meaning, field in (
            ("domain_loss", "Unweighted loss of a domain.", "lm_loss"),
            ("domain_weight_ratio", "A domain's share of the weight.", "weight_share"),
        ):
            samples = _of_domains(records, field)
            yield from _labelled(name, meaning, ("split", "domain"), samples)


def _labelled(
    name: str, meaning: str, labels: Sequence[str], samples: _Samples
) -> Iterator[Metric]:
    if samples:
        gauge = GaugeMetricFamily(f"megatron_rw_{name}", meaning, labels=labels)
        for values, number in samples:
            gauge.add_metric(values, number)
        yield gauge


def _by_metric(train: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a record of a logging interval by the name of their metric."""
    speed, reweight = train.get("speed", {}), train.get("reweight", {})
    return {
        **train,
        **{f"reweight_{name}": value for name, value in reweight.items()},
        "reweight_ess_ratio": reweight.get("ess"),
        "step_duration_seconds": speed.get("seconds_per_step"),
        "tokens_per_second": speed.get("tokens_per_second"),
    }


def _losses(records: Mapping[str, Mapping[str, Any]]) -> _Samples:
    losses = [
        ((split, name), value)
        for split, record in records.items()
        for name, value in record.items()
        if isinstance(value, float) and name not in {"time", *_MEANINGS}
    ]
    weighted = records.get("train", {}).get("reweight", {}).get("objective")
    if weighted is not None:
        losses.append((("train", "weighted_loss"), weighted))
    return losses


def _of_domains(records: Mapping[str, Mapping[str, Any]], field: str) -> _Samples:
    return [
        ((split, name), domain[field])
        for split, record in records.items()
        for name, domain in (record.get("reweight") or record).get("domains", {}).items()
        if domain.get(field) is not None
    ]
