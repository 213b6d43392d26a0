"""Stages of the quick start and the study: order, resumption, failure, and the time left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.stages import Stage, StageError, execute, run_stages


def writing(folder: Path, name: str, after: tuple[Stage, ...] = (), setting: int = 0) -> Stage:
    """A stage that appends its name to a file of all that ran, and makes its output."""

    def run() -> None:
        with (folder / "ran").open("a") as file:
            file.write(f"{name}\n")
        (folder / name).touch()

    return Stage(name, folder / name, run, after=after, settings=[setting])


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().split() if (folder / "ran").exists() else []


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_stage_runs_once_behind_its_predecessors_and_again_when_they_change(
    tmp_path: Path, jobs: int
) -> None:
    def stages(setting: int) -> list[Stage]:
        first = writing(tmp_path, "first", setting=setting)
        both = [writing(tmp_path, name, (first,)) for name in ("left", "right")]
        return [first, *both, writing(tmp_path, "last", tuple(both)), writing(tmp_path, "other")]

    run_stages(stages(0), tmp_path, jobs)
    order = ran(tmp_path)
    assert sorted(order) == ["first", "last", "left", "other", "right"]
    assert order.index("first") < min(order.index("left"), order.index("right"))
    assert order.index("last") > max(order.index("left"), order.index("right"))
    run_stages(stages(0), tmp_path, jobs)
    assert ran(tmp_path) == order
    run_stages(stages(1), tmp_path, jobs)
    assert sorted(ran(tmp_path)[5:]) == ["first", "last", "left", "right"]


def test_what_is_made_again_makes_what_builds_on_it_old(tmp_path: Path) -> None:
    """Its inputs are the same, but a successor may have written into its folder."""
    first = writing(tmp_path, "first")
    stages = [first, writing(tmp_path, "last", (first,)), writing(tmp_path, "other")]
    run_stages(stages, tmp_path)
    (tmp_path / "first").unlink()
    run_stages(stages, tmp_path)
    assert ran(tmp_path)[3:] == ["first", "last"]


def test_stages_run_beside_each_other(tmp_path: Path) -> None:
    """Two that wait for each other's file can end only together."""

    def waiting(mine: str, other: str) -> Callable[[], None]:
        def run() -> None:
            (tmp_path / mine).touch()
            deadline = time.monotonic() + 20
            while not (tmp_path / other).exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        return run

    names = (("a", "b"), ("b", "a"))
    run_stages([Stage(m, tmp_path / m, waiting(m, o)) for m, o in names], tmp_path, jobs=2)


def test_a_failure_is_told_ends_the_others_and_leaves_them_undone(tmp_path: Path) -> None:
    def fail() -> None:
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        execute([sys.executable, "-c", "print('error: --x 1: give 2'); exit(2)"], tmp_path / "log")

    def wait() -> None:
        code = f"import time; open({str(tmp_path / 'began')!r}, 'w'); time.sleep(60)"
        execute([sys.executable, "-c", code], tmp_path / "other")

    begun = time.monotonic()
    stages = [Stage("bad", tmp_path / "log", fail), Stage("long", tmp_path / "other", wait)]
    with pytest.raises(StageError) as raised:
        run_stages(stages, tmp_path, jobs=2)
    assert time.monotonic() - begun < 30
    full = f"full output: {tmp_path / 'log'}"
    assert str(raised.value) == f"stage 'bad' failed; status 2; error: --x 1: give 2\n{full}"
    assert {path.name for path in (tmp_path / ".stages").iterdir()} == {"lock"}


def test_a_traceback_is_shown_whole(tmp_path: Path) -> None:
    code = "print('error: rank 0: unexpected failure:', flush=True); raise KeyError('state')"
    with pytest.raises(StageError, match=r"Traceback[^$]*KeyError: 'state'"):
        execute([sys.executable, "-c", code], tmp_path / "log")


RUNNER = """
import sys, time
from pathlib import Path
from examples.stages import Stage, execute, interrupted_by_sigterm, run_stages
out = Path(sys.argv[1])
interrupted_by_sigterm()
code = f"import time; open({str(out / 'began')!r}, 'w'); time.sleep(60)"
run_stages([Stage("x", out / "x", lambda: execute([sys.executable, "-c", code], out / "log"))], out)
"""


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_left_of_a_killed_run_is_waited_for(tmp_path: Path, ending: signal.Signals) -> None:
    """A second one does not write into the same folder; what SIGTERM ends leaves nothing."""
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, tmp_path], start_new_session=True)
    try:
        while not (tmp_path / "began").exists():
            time.sleep(0.02)
        runner.send_signal(ending)
        runner.wait(timeout=30)
        if ending == signal.SIGKILL:
            with pytest.raises(StageError, match="one that was killed has left its commands"):
                run_stages([writing(tmp_path, "y")], tmp_path)
        else:
            run_stages([writing(tmp_path, "y")], tmp_path)
    finally:
        left = subprocess.run(["pgrep", "-f", str(tmp_path / "began")], stdout=subprocess.PIPE)
        for process in left.stdout.split():
            os.kill(int(process), signal.SIGKILL)
    assert (ending == signal.SIGTERM) == (not left.stdout)
