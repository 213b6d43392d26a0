"""`megatron_rw.resilience.health` beside the real program: while it trains, hangs and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_rw.resilience import health
from tests.program import in_turn, run_program, signal_when

ENDLESS = (
    "--train-iters 1000000 --micro-batch-size 2 --global-batch-size 2 "
    "--reweight-strategy none --exit-signal-handler"
).split()
# Seconds; steps of the small model take hundredths of one where nothing else runs.
LIMIT = 2 * health.EVERY_S


@pytest.fixture
def heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "heartbeat"
    monkeypatch.setenv(health.PATH_VARIABLE, str(path))
    monkeypatch.setenv(health.LIMIT_VARIABLE, str(LIMIT))
    return path


def test_run_that_stands_still_is_unhealthy_until_it_goes_on(
    tmp_path: Path, heartbeat: Path, data_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "metrics.jsonl"

    def trains() -> bool:
        return metrics.exists() and metrics.read_text().count("\n") >= 2 and health.main() == 0

    disturb = in_turn(
        signal_when(trains, signal.SIGSTOP),
        signal_when(lambda: health.main() == 1, signal.SIGCONT),
        signal_when(lambda: health.main() == 0, signal.SIGTERM),
    )
    environment = {health.PATH_VARIABLE: str(heartbeat)}
    run_program(tmp_path, *data_flags, *ENDLESS, disturb=disturb, environment=environment).check()
    said = capsys.readouterr().out
    assert said.startswith("healthy: the run made progress ")
    assert f"\nunhealthy (limit {LIMIT:g} s, MEGATRON_RW_HEALTH_SECONDS): the run made" in said


def test_a_run_that_has_ended_is_no_run_that_stands_still(heartbeat: Path) -> None:
    beat = "from megatron_rw.resilience.health import Heartbeat as h; print(h()._path.exists())"
    done = subprocess.run([sys.executable, "-c", beat], capture_output=True, text=True)
    assert done.stdout == "True\n"
    assert not heartbeat.exists()


def test_new_run_has_the_whole_limit_for_its_first_step(heartbeat: Path) -> None:
    for _ in range(2):
        health.Heartbeat()
        assert health.main() == 0
        os.utime(heartbeat, (0, 0))
        assert health.main() == 1


def test_file_of_a_run_that_was_killed_is_no_run(heartbeat: Path) -> None:
    health.Heartbeat()
    heartbeat.write_text("999999999")
    os.utime(heartbeat, (0, 0))
    assert health.main() == 0


def test_heartbeat_touches_the_file_now_and_then(
    heartbeat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = health.Heartbeat()
    for seconds, touched in ((1000.0, True), (1004.0, False), (1006.0, True)):
        os.utime(heartbeat, (0, 0))
        monkeypatch.setattr(time, "monotonic", lambda now=seconds: now)
        beats.beat()
        assert (heartbeat.stat().st_mtime > 0) == touched


def test_only_the_first_process_of_a_host_beats(
    heartbeat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    health.Heartbeat().beat()
    assert not heartbeat.exists()


def test_heartbeat_that_cannot_be_written_ends_nothing(
    heartbeat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heartbeat.parent.touch()
    health.Heartbeat().beat()
    assert "no heartbeat for the health check" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({}, 0, "healthy: no run is here"),
        ({health.PATH_VARIABLE: ""}, 0, "healthy: no run is here"),
        ({health.LIMIT_VARIABLE: "soon"}, 1, "SECONDS=soon: give a number of seconds"),
    ],
)
def test_check_without_a_run(
    variables: dict[str, str],
    status: int,
    said: str,
    heartbeat: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert health.main() == status
    assert said in capsys.readouterr().out


def test_scoring_and_evaluations_are_alive_without_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rw.resilience.watchdog import Progress
    from megatron_rw.training.callbacks.progress import ProgressCallback

    heartbeat = tmp_path / "heartbeat"
    monkeypatch.setenv("MEGATRON_RW_HEARTBEAT", str(heartbeat))
    monkeypatch.setenv("LOCAL_RANK", "0")
    callback = ProgressCallback(Namespace(distributed_timeout_minutes=1), Progress())
    os.utime(heartbeat, (0, 0))
    callback.before_batch(training=False)
    assert heartbeat.stat().st_mtime > 0
