"""Prometheus can read what the endpoint says, and that is what the run has logged."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_rw.errors import UserError
from megatron_rw.observability.config import MonitoringConfig
from megatron_rw.observability.endpoint import Endpoint
from tests.ports import free_port
from tests.program import run_program

FLAGS = (
    "--train-iters 1000 --micro-batch-size 8 --log-interval 2 --exit-signal-handler "
    "--eval-interval 2 --save-interval 3 --reweight-strategy linupper --reweight-temperature 0.4 "
    "--prometheus-port 0"
).split()


def fetch(url: str) -> dict[str, float]:
    """Values by what stands before them, without the prefix that all have."""
    with urllib.request.urlopen(url, timeout=6.0) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("megatron_rw_"): float(value) for name, value in lines}


def test_a_live_run_tells_what_it_logs(tmp_path: Path, data_flags: list[str]) -> None:
    log = tmp_path / "rank1.log"
    value: dict[str, float] = {}
    awaited = {'loss{loss="lm_loss",split="train"}', 'loss{loss="lm_loss",split="validation"}'}

    def end_once_all_is_there(pids: Sequence[int]) -> bool:
        text = log.read_text() if log.exists() else ""
        found = re.search(r"^> metrics at (\S+) ", text, re.MULTILINE)
        if found is None:
            return False
        value.update(fetch(found[1]))
        if not awaited | {"last_checkpoint_iteration"} <= value.keys():
            return False
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return True

    run = run_program(
        tmp_path,
        *(*data_flags, *FLAGS, "--save", str(tmp_path / "checkpoints")),
        processes=2,
        disturb=end_once_all_is_there,
    ).check()
    assert "metrics at" not in run.output[0]
    lm_loss = value['loss{loss="lm_loss",split="train"}']
    [record] = [r for r in run.train_metrics() if r["lm_loss"] == lm_loss]
    reweight, speed = record["reweight"], record["speed"]
    domains = reweight["domains"]
    for name, logged in {
        "learning_rate": record["learning_rate"],
        "grad_norm": record["grad_norm"],
        "loss_scale": record["loss_scale"],
        "step_duration_seconds": speed["seconds_per_step"],
        "tokens_per_second": speed["tokens_per_second"],
        "reweight_ess_ratio": reweight["ess"],
        "reweight_max_weight": reweight["max_weight"],
        "reweight_relative_max_weight": reweight["relative_max_weight"],
        "reweight_temperature": reweight["temperature"],
        "reweight_nonfinite_samples": reweight["nonfinite_samples"],
        'loss{loss="weighted_loss",split="train"}': reweight["objective"],
        'domain_loss{domain="noise",split="train"}': domains["noise"]["lm_loss"],
        'domain_weight_ratio{domain="easy",split="train"}': domains["easy"]["weight_share"],
        "consumed_samples": 16 * value["iteration"],
        "consumed_tokens": 32 * value["consumed_samples"],
        "skipped_iterations_total": 0,
    }.items():
        assert value[name] == logged, name
    validation = value['loss{loss="lm_loss",split="validation"}']
    assert validation in [r["lm_loss"] for r in run.metrics if r["type"] == "validation"]
    saved = value["last_checkpoint_iteration"]
    assert saved % 3 == 0
    assert 0 < saved <= value["iteration"]
    for name in ("last_checkpoint_timestamp_seconds", "last_step_timestamp_seconds"):
        assert value["start_time_seconds"] < value[name] <= time.time()
    # The speed is that of steps alone: a global batch of 16 samples of 32 tokens each.
    assert speed["tokens_per_second"] * speed["seconds_per_step"] == pytest.approx(512)


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


def test_counts_skipped_iterations_and_shows_a_loss_that_is_not_a_number() -> None:
    endpoint = Endpoint("0.0.0.0", 0, 32)
    assert endpoint.url.startswith(f"http://{socket.gethostname()}:"), "others are to reach it"
    assert fetch(endpoint.url).keys() == {"start_time_seconds"}, "before the first step"
    for iteration, skipped in ((8, False), (9, True), (10, True)):
        endpoint.step(iteration, 16 * iteration, skipped)
    domains = {"a": {"lm_loss": math.inf}, "b": {"lm_loss": None}}
    endpoint.update({"type": "train", "lm_loss": math.nan, "domains": domains})
    metrics = fetch(endpoint.url)
    endpoint.close()
    assert metrics["iteration"] == 10
    assert metrics["skipped_iterations_total"] == 2
    assert math.isnan(metrics['loss{loss="lm_loss",split="train"}'])
    assert metrics['domain_loss{domain="a",split="train"}'] == math.inf
    assert 'domain_loss{domain="b",split="train"}' not in metrics, "it had no samples"


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


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install prometheus-client") as refused:
        MonitoringConfig(prometheus_port=0)
    assert not refused.value.known_to_all, "another host may have it"
