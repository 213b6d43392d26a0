"""The newest metrics, for Prometheus to fetch over HTTP (`--prometheus-port`).

The training thread leaves what it logs with the `Endpoint`, an assignment; a thread of the server
makes text of it when somebody asks. Nothing is read from the device for it.
"""

from __future__ import annotations

import http.server
import os
import socket
import socketserver
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rw.errors import UserError
from megatron_rw.observability.exposition import CONTENT_TYPE, Family, Samples, exposition

PATH = "/metrics"
DEFAULT_ADDRESS = "127.0.0.1"
# Seconds that a client may take to ask and to read.
CLIENT_S = 10.0

# Gauges of a logging interval: name, meaning, and where a record of metrics.jsonl has it.
_INTERVAL = (
    ("learning_rate", "Learning rate of the last step.", "learning_rate"),
    ("loss_scale", "Loss scale of mixed precision.", "loss_scale"),
    ("grad_norm", "Norm of the gradient before clipping.", "grad_norm"),
    (
        "step_duration_seconds",
        "A step, without evaluations and checkpoints.",
        "speed.seconds_per_step",
    ),
    ("tokens_per_second", "Tokens trained on, of all ranks.", "speed.tokens_per_second"),
    ("reweight_temperature", "Temperature of the last step.", "reweight.temperature"),
    (
        "reweight_ess_ratio",
        "Effective sample size as a fraction of the set; 1 is uniform.",
        "reweight.ess",
    ),
    ("reweight_max_weight", "Largest weight of a sample.", "reweight.max_weight"),
    (
        "reweight_relative_max_weight",
        "Largest weight times set size, mean over sets; 1 is uniform.",
        "reweight.relative_max_weight",
    ),
    (
        "reweight_nonfinite_samples",
        "Samples left out since their loss is not finite.",
        "reweight.nonfinite_samples",
    ),
)
# Of a record's own fields, those that are not losses.
_NOT_LOSSES = {"time", "iteration"} | {path for *_, path in _INTERVAL}


class EndpointError(UserError):
    """The endpoint cannot be opened, which only the rank that serves it knows."""


@dataclass(frozen=True)
class _Steps:
    """How far the run is.

    Attributes:
        iteration: completed iterations.
        samples: consumed, over the whole training.
        skipped: iterations without an update, since the process began.
        when: the last of them ended, Unix time.
    """

    iteration: int
    samples: int
    skipped: int
    when: float


class Endpoint:
    """Serves `/metrics` from a thread of its own.

    Args:
        address: to listen at.
        port: 0 for a free one.
        seq_length: tokens of a sample.

    Attributes:
        url: where.

    Raises:
        EndpointError: the port is taken, or the address is not this host's.
    """

    def __init__(self, address: str, port: int, seq_length: int) -> None:
        self._seq_length = seq_length
        self._started = time.time()
        # Each is replaced as a whole: the server's threads see the old or the new one.
        self._steps: _Steps | None = None
        self._saved: tuple[int, float] | None = None
        self._records: dict[str, Mapping[str, Any]] = {}
        try:
            self._server = _Server(address, port, self.text)
        except OSError as error:
            raise EndpointError(
                f"--prometheus-port {port}: rank {os.environ.get('RANK', '0')} on "
                f"{socket.gethostname()} cannot listen at {address}: {error.strerror}. Give "
                "another port, or 0 for any that is free, and see --prometheus-address."
            ) from error
        host, port = self._server.server_address[:2]
        host = socket.gethostname() if host in ("0.0.0.0", "::") else str(host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}{PATH}"
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def step(self, iteration: int, samples: int, skipped: bool) -> None:
        """Note a step.

        Args:
            iteration: completed iterations.
            samples: consumed so far.
            skipped: there was no update.
        """
        before = 0 if self._steps is None else self._steps.skipped
        self._steps = _Steps(iteration, samples, before + skipped, time.time())

    def saved(self, iteration: int) -> None:
        """Note a complete checkpoint."""
        self._saved = (iteration, time.time())

    def update(self, record: Mapping[str, Any]) -> None:
        """Note a record of metrics.jsonl, of numbers alone; later ones of its type replace it."""
        self._records[record["type"]] = record

    def text(self) -> str:
        """What `/metrics` answers."""
        return exposition(self._families())

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _families(self) -> Iterator[Family]:
        def gauge(name: str, text: str, samples: Samples | float) -> Family:
            values = [({}, samples)] if isinstance(samples, int | float) else samples
            return Family(f"megatron_rw_{name}", "gauge", text, values)

        yield gauge("start_time_seconds", "When the process began, Unix time.", self._started)
        steps, saved, records = self._steps, self._saved, dict(self._records)
        if steps is not None:
            yield gauge("iteration", "Completed iterations.", steps.iteration)
            yield gauge("consumed_samples", "Samples trained on.", steps.samples)
            yield gauge("consumed_tokens", "Tokens trained on.", steps.samples * self._seq_length)
            yield gauge(
                "last_step_timestamp_seconds", "When the last step ended, Unix time.", steps.when
            )
            yield Family(
                "megatron_rw_skipped_iterations_total",
                "counter",
                "Iterations without an update since the process began.",
                [({}, steps.skipped)],
            )
        if saved is not None:
            yield gauge("last_checkpoint_iteration", "Of the last complete checkpoint.", saved[0])
            yield gauge(
                "last_checkpoint_timestamp_seconds",
                "When this process last completed a checkpoint, Unix time.",
                saved[1],
            )
        train = records.get("train", {})
        for name, text, path in _INTERVAL:
            value = _at(train, path)
            if value is not None:
                yield gauge(name, text, value)
        yield gauge("loss", "Nats per token; of training, mean of an interval.", _losses(records))
        yield gauge("domain_loss", "Unweighted loss of a domain.", _of_domains(records, "lm_loss"))
        yield gauge(
            "domain_weight_ratio",
            "A domain's share of the weight.",
            _of_domains(records, "weight_share"),
        )
        slowest = train.get("slowest_rank")
        if slowest is not None:
            labels = {"rank": str(slowest["rank"]), "host": slowest["host"]}
            yield gauge(
                "slowest_rank_ratio",
                "Forward time of the slowest rank over the median of its pipeline stage.",
                [(labels, slowest["ratio"])],
            )


def _at(record: Mapping[str, Any], path: str) -> float | None:
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if value is not None else None
    return value


def _losses(records: Mapping[str, Mapping[str, Any]]) -> Samples:
    losses = [
        ({"split": split, "loss": name}, value)
        for split, record in records.items()
        for name, value in record.items()
        if isinstance(value, float) and name not in _NOT_LOSSES
    ]
    weighted = _at(records.get("train", {}), "reweight.objective")
    if weighted is not None:
        losses.append(({"split": "train", "loss": "weighted_loss"}, weighted))
    return losses


def _of_domains(records: Mapping[str, Mapping[str, Any]], field: str) -> Samples:
    return [
        ({"split": split, "domain": name}, domain[field])
        for split, record in records.items()
        for name, domain in (record.get("reweight") or record).get("domains", {}).items()
        if domain.get(field) is not None
    ]


class _Server(socketserver.ThreadingTCPServer):
    # After a run that was killed, its connections may still be closing.
    allow_reuse_address = True
    # Two runs must not share a port.
    allow_reuse_port = False
    daemon_threads = True

    def __init__(self, address: str, port: int, text: Callable[[], str]) -> None:
        self.address_family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        self.text = text
        super().__init__((address, port), _Handler)
        # Loaders of data and writers of checkpoints are forks; one that outlives the rank would
        # keep the port from the run that follows.
        os.register_at_fork(after_in_child=self.socket.close)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is its own affair."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = CLIENT_S
    server: _Server

    def do_GET(self) -> None:
        """Answer."""
        if self.path != PATH:
            self.send_error(404, f"only {PATH} is here")
            return
        body = self.server.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing into the training's log."""


def serve(args: Namespace) -> Endpoint | None:
    """Open the endpoint that the flags ask for, on the rank that has all metrics, the last.

    Args:
        args: validated.

    Returns:
        The endpoint; None without --prometheus-port, and on the other ranks.

    Raises:
        EndpointError: it cannot be opened.
    """
    if args.prometheus_port is None or args.rank != args.world_size - 1:
        return None
    endpoint = Endpoint(args.prometheus_address, args.prometheus_port, args.seq_length)
    print(f"> metrics at {endpoint.url} (rank {args.rank}, {socket.gethostname()})", flush=True)
    return endpoint
