"""Prometheus can read what the endpoint says, and that is what the run has logged."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.observability.exposition import CONTENT_TYPE, Family, exposition
from megatron_rw.observability.prometheus import CLIENT_S, Endpoint, EndpointError, serve
from tests.observability.parser import Metric, parse
from tests.ports import free_port
from tests.program import Run, run_program

FLAGS = (
    "--train-iters 1000 --micro-batch-size 8 --log-interval 2 --exit-signal-handler "
    "--eval-interval 2 --save-interval 3 --reweight-strategy linupper --reweight-temperature 0.4 "
    "--log-slowest-rank --prometheus-port 0"
).split()


def fetch(url: str) -> str:
    # Less than a silent client is given.
    with urllib.request.urlopen(url, timeout=0.6 * CLIENT_S) as answer:
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        return str(answer.read().decode())


class Scraper:
    """Asks a run for its metrics until all are there, then ends it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.metrics: dict[str, Metric] = {}

    def __call__(self, pids: Sequence[int]) -> bool:
        text = self._log.read_text() if self._log.exists() else ""
        found = re.search(r"^> metrics at (\S+) ", text, re.MULTILINE)
        if found is None:
            return False
        self.metrics = parse(fetch(found[1]))
        splits = {
            value
            for labels in self.metrics.get("megatron_rw_loss", Metric("", "")).samples
            for key, value in labels
            if key == "split"
        }
        checkpoint = "megatron_rw_last_checkpoint_iteration" in self.metrics
        if not checkpoint or splits != {"train", "validation"}:
            return False
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return True


@pytest.fixture(scope="module")
def scraped(
    tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]
) -> tuple[Run, dict[str, Metric]]:
    directory = tmp_path_factory.mktemp("scraped")
    scraper = Scraper(directory / "rank1.log")
    save = ["--save", str(directory / "checkpoints")]
    run = run_program(directory, *data_flags, *FLAGS, *save, processes=2, disturb=scraper).check()
    return run, scraper.metrics


def test_a_live_run_tells_what_it_logs(scraped: tuple[Run, dict[str, Metric]]) -> None:
    run, metrics = scraped
    value = {name.removeprefix("megatron_rw_"): metric for name, metric in metrics.items()}
    loss = value["loss"].of(split="train", loss="lm_loss")
    [record] = [r for r in run.train_metrics() if r["lm_loss"] == loss]
    reweight, slowest = record["reweight"], record["slowest_rank"]
    assert value["loss"].of(split="train", loss="weighted_loss") == reweight["objective"]
    assert (
        value["domain_loss"].of(split="train", domain="noise")
        == (reweight["domains"]["noise"]["lm_loss"])
    )
    assert (
        value["domain_weight_ratio"].of(split="train", domain="easy")
        == (reweight["domains"]["easy"]["weight_share"])
    )
    assert (
        value["slowest_rank_ratio"].of(rank=str(slowest["rank"]), host=slowest["host"])
        == (slowest["ratio"])
    )
    for name, logged in {
        "learning_rate": record["learning_rate"],
        "grad_norm": record["grad_norm"],
        "loss_scale": record["loss_scale"],
        "step_duration_seconds": record["speed"]["seconds_per_step"],
        "tokens_per_second": record["speed"]["tokens_per_second"],
        "reweight_ess_ratio": reweight["ess"],
        "reweight_max_weight": reweight["max_weight"],
        "reweight_temperature": reweight["temperature"],
        "reweight_nonfinite_samples": reweight["nonfinite_samples"],
    }.items():
        assert value[name].value == logged, name
    validation = value["loss"].of(split="validation", loss="lm_loss")
    assert validation in [r["lm_loss"] for r in run.metrics if r["type"] == "validation"]


def test_a_live_run_tells_how_far_it_is(scraped: tuple[Run, dict[str, Metric]]) -> None:
    run, metrics = scraped
    value = {
        name.removeprefix("megatron_rw_"): metric.value
        for name, metric in metrics.items()
        if frozenset() in metric.samples
    }
    assert value["consumed_samples"] == 16 * value["iteration"]
    assert value["consumed_tokens"] == 32 * value["consumed_samples"]
    assert value["skipped_iterations_total"] == 0
    assert value["last_checkpoint_iteration"] % 3 == 0
    assert 0 < value["last_checkpoint_iteration"] <= value["iteration"]
    assert value["start_time_seconds"] < value["last_checkpoint_timestamp_seconds"] <= time.time()
    assert value["start_time_seconds"] < value["last_step_timestamp_seconds"] <= time.time()
    # Of steps alone: a global batch of 16 samples of 32 tokens each.
    assert value["tokens_per_second"] * value["step_duration_seconds"] == pytest.approx(512)
    assert "metrics at" not in run.output[0]


def test_a_port_in_use_ends_the_run_with_one_line(tmp_path: Path, data_flags: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        flags = ["--train-iters", "1", "--micro-batch-size", "8", "--prometheus-port", port]
        run = run_program(tmp_path, *data_flags, *flags, processes=2, patience=0.5)
    assert run.status[1] == 2, run.all_output
    errors = [line for line in run.all_output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.all_output
    assert f"--prometheus-port {port}: rank 1 on {socket.gethostname()} cannot listen" in errors[0]
    assert "Address already in use. Give another port" in errors[0]
    assert "building GPT model" not in run.all_output


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    it = Endpoint("127.0.0.1", 0, 32)
    yield it
    it.close()


def test_speaks_before_the_first_step(endpoint: Endpoint) -> None:
    assert parse(fetch(endpoint.url)).keys() == {"megatron_rw_start_time_seconds"}


def test_counts_skipped_iterations_and_shows_a_loss_that_is_not_a_number(
    endpoint: Endpoint,
) -> None:
    for iteration, skipped in ((8, False), (9, True), (10, True)):
        endpoint.step(iteration, 16 * iteration, skipped)
    domains = {"a": {"lm_loss": math.inf}, "b": {"lm_loss": None}}
    endpoint.update({"type": "train", "lm_loss": math.nan, "domains": domains})
    metrics = parse(fetch(endpoint.url))
    assert metrics["megatron_rw_iteration"].value == 10
    assert metrics["megatron_rw_skipped_iterations_total"].value == 2
    assert math.isnan(metrics["megatron_rw_loss"].of(split="train", loss="lm_loss"))
    losses = metrics["megatron_rw_domain_loss"]
    assert losses.of(split="train", domain="a") == math.inf
    assert len(losses.samples) == 1, "domain b had no samples"


def test_a_client_that_says_nothing_holds_up_nobody(endpoint: Endpoint) -> None:
    host, port = endpoint.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))):
        endpoint.step(1, 16, False)
        assert parse(fetch(endpoint.url))["megatron_rw_iteration"].value == 1


def test_serves_nothing_else(endpoint: Endpoint) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(endpoint.url.replace("/metrics", "/"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_does_not_keep_the_port() -> None:
    port = free_port()
    first = Endpoint("127.0.0.1", port, 32)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    first.close()
    try:
        Endpoint("127.0.0.1", port, 32).close()
    finally:
        os.close(write)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(("rank", "serves"), [(0, False), (2, False), (3, True)])
def test_the_last_rank_serves(rank: int, serves: bool, capsys: pytest.CaptureFixture[str]) -> None:
    args: dict[str, Any] = {"prometheus_port": 0, "prometheus_address": "0.0.0.0"}
    it = serve(Namespace(rank=rank, world_size=4, seq_length=32, **args))
    assert (it is not None) == serves
    said = capsys.readouterr().out
    if it is not None:
        assert it.url.startswith(f"http://{socket.gethostname()}:")
        assert said == f"> metrics at {it.url} (rank 3, {socket.gethostname()})\n"
        it.close()


def test_an_address_of_another_host_is_named() -> None:
    # Of the block for documentation: nobody's.
    with pytest.raises(EndpointError, match=r"cannot listen at 192\.0\.2\.1: Cannot assign"):
        Endpoint("192.0.2.1", 0, 32)


@given(st.text(min_size=1), st.text(), st.floats())
def test_any_text_and_number_can_be_read_back(text: str, label: str, value: float) -> None:
    family = Family("metric", "gauge", text, [({"name": label}, value)])
    metric = parse(exposition([family]))["metric"]
    assert metric.text == text
    assert repr(metric.of(name=label)) == repr(value)
