"""`megatron_rw.resilience.health` beside the real program: while it trains, hangs and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_rw.resilience import health
from tests.program import MODEL, TRAINING

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = (
    "--train-iters 1000000 --micro-batch-size 2 --global-batch-size 2 --reweight-strategy none"
).split()
# Seconds; steps of the small model take hundredths of one where nothing else runs.
LIMIT = 5.0


def check(pid: int, limit: str) -> subprocess.CompletedProcess[str]:
    """The health check of the image, of one process: this machine may have other runs."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_rw.resilience.health", str(pid)],
        env=os.environ | {health.LIMIT_VARIABLE: limit},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def until(reached: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[Sequence[str]], int]]:
    """Start a command in `tmp_path`; all are killed at the end."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str]) -> int:
        with (tmp_path / "output.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        processes.append(process)
        # Linux fills it in a moment after the program has begun.
        until(lambda: (health.PROC / str(process.pid) / "cmdline").read_bytes() != b"")
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.wait()


def stand_in(folder: Path) -> Path:
    """A program of the same name that does nothing, for what depends on the command line alone."""
    path = folder / "pretrain_gpt_rw.py"
    path.write_text("import time\ntime.sleep(600)\n")
    return path


def test_run_that_stands_still_is_unhealthy_until_it_goes_on(
    tmp_path: Path, data_flags: list[str], started: Callable[[Sequence[str]], int]
) -> None:
    program = str(ROOT / "pretrain_gpt_rw.py")
    flags = ["--device", "cpu", *MODEL, *TRAINING, *data_flags, *ENDLESS, "--log-dir", "run"]
    pid = started([sys.executable, program, *flags])
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    healthy = check(pid, str(LIMIT))
    assert healthy.returncode == 0, healthy.stdout
    assert healthy.stdout.startswith(f"healthy: {metrics} has had no new line for ")

    os.kill(pid, signal.SIGSTOP)
    until(lambda: check(pid, str(LIMIT)).returncode == 1, 10 * LIMIT)
    stopped = check(pid, str(LIMIT))
    assert stopped.stdout.startswith(f"unhealthy (limit {LIMIT:g} s, MEGATRON_RW_HEALTH_SECONDS)")

    os.kill(pid, signal.SIGCONT)
    until(lambda: check(pid, str(LIMIT)).returncode == 0)


def test_new_run_has_the_whole_limit_for_its_first_step(
    tmp_path: Path, started: Callable[[Sequence[str]], int]
) -> None:
    (tmp_path / "run").mkdir()
    old = tmp_path / "run" / "metrics.jsonl"
    old.write_text("{}\n")
    os.utime(old, (time.time() - 9000, time.time() - 9000))
    pid = started([sys.executable, str(stand_in(tmp_path)), "--log-dir=run"])
    assert check(pid, "60").returncode == 0
    time.sleep(0.5)
    assert check(pid, "0.4").returncode == 1


def test_flag_is_found_in_an_argument_file_and_behind_a_launcher(
    tmp_path: Path, started: Callable[[Sequence[str]], int]
) -> None:
    (tmp_path / "own.args").write_text("--seed 3 # a comment\n--log-dir elsewhere\n")
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import time\ntime.sleep(600)\n")
    program = str(stand_in(tmp_path))
    pid = started([sys.executable, str(launcher), "--nproc", "8", program, "@own.args"])
    until(lambda: list(health.runs([pid])) == [tmp_path / "elsewhere"], 5)


def test_oldest_process_of_a_run_counts(
    tmp_path: Path, started: Callable[[Sequence[str]], int]
) -> None:
    command = [sys.executable, str(stand_in(tmp_path)), "--log-dir", "run"]
    first = started(command)
    time.sleep(0.5)
    second = started(command)
    younger = health.runs([second])[tmp_path / "run"]
    assert health.runs([first, second])[tmp_path / "run"] > younger + 0.4


def test_nothing_known_is_healthy(tmp_path: Path, started: Callable[[Sequence[str]], int]) -> None:
    for command in (
        [sys.executable, str(stand_in(tmp_path))],
        [sys.executable, "-c", "import time; time.sleep(600)", "--log-dir", "run"],
    ):
        result = check(started(command), "0")
        assert (result.returncode, result.stdout) == (0, "healthy: no run with --log-dir here\n")


def test_what_cannot_be_read_is_said(
    tmp_path: Path, started: Callable[[Sequence[str]], int]
) -> None:
    result = check(started([sys.executable, str(stand_in(tmp_path)), "@gone.args"]), "0")
    assert result.returncode == 0
    assert "gone.args" in result.stdout
    bad = check(os.getpid(), "soon")
    assert (bad.returncode, bad.stdout) == (
        1,
        "error: MEGATRON_RW_HEALTH_SECONDS=soon: give a number of seconds\n",
    )
