"""Stages of a longer piece of work, each done once and again when something it depends on changes.

The quick start and the study are lists of stages. One that is interrupted leaves no record of
itself, so that the next call does it again from its beginning and goes on after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

# Seconds; less is not worth saying.
_LEAST_LEFT = 120.0


class StageError(Exception):
    """A stage has failed; the text is all that a user needs."""


@dataclass(frozen=True)
class Stage:
    """One step of the work.

    Attributes:
        name: also the name of its record of what it was made from.
        output: a file or folder that exists once it is done.
        run: does the work.
        depends: files whose content it depends on.
        after: the stages that it builds on.
        settings: whatever else its output depends on.
        cost: how long it takes beside the others, in any unit; 1 is next to nothing.
    """

    name: str
    output: Path
    run: Callable[[], None]
    depends: Sequence[Path] = ()
    after: Sequence[Stage] = ()
    settings: Sequence[object] = ()
    cost: float = 1.0

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of all that the output depends on."""
        digest = hashlib.sha256(json.dumps([sys.version, *map(str, self.settings)]).encode())
        for path in self.depends:
            digest.update(_content(path))
        for stage in self.after:
            digest.update(stage.fingerprint.encode())
        return digest.hexdigest()


@functools.cache
def _content(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def run_stages(stages: Sequence[Stage], folder: Path, jobs: int = 1) -> None:
    """Runs the stages that are not current, in order or as many at a time as there are `jobs`.

    Args:
        stages: all of them, each behind those that it builds on.
        folder: the folder of the work, which no other process may be working in.
        jobs: how many run at the same time.

    Raises:
        StageError: a stage has failed, or another process works in the folder. Other stages that
            were running are ended and left undone.
    """
    records = folder / ".stages"
    records.mkdir(parents=True, exist_ok=True)
    with _alone(folder), ThreadPoolExecutor(jobs) as pool:
        board = _Board(stages, records, jobs)
        running: dict[Future[None], Stage] = {}
        try:
            while board.waiting or running:
                for stage in board.ready(jobs - len(running)):
                    running[pool.submit(board.run, stage)] = stage
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    board.done(running.pop(future), future)
        except BaseException:
            _end_commands()
            raise


class _Board:
    """Which stages wait, and what is said of them."""

    def __init__(self, stages: Sequence[Stage], records: Path, jobs: int) -> None:
        self._records, self._jobs, self._total = records, jobs, len(stages)
        self._finished: set[str] = set()
        self._old: set[str] = set()
        for stage in stages:
            if not self._is_current(stage) or any(s.name in self._old for s in stage.after):
                self._old.add(stage.name)
                # Whoever looks at it meanwhile is not to take it for new.
                self._record(stage).unlink(missing_ok=True)
                if stage.output.is_file():
                    stage.output.unlink()
        if not self._old:
            print(f"all {len(stages)} stages are current")
        self._alone = jobs == 1
        self._spent = self._worked = 0.0
        self.waiting = list(stages)

    def ready(self, most: int) -> Iterator[Stage]:
        """Yields stages whose predecessors are done; those that are current are done at once."""
        started = 0
        for stage in list(self.waiting):
            if started == most:
                return
            if any(before.name not in self._finished for before in stage.after):
                continue
            self.waiting.remove(stage)
            if stage.name not in self._old:
                self._finished.add(stage.name)
                if self._alone:
                    print(f"{self._title(stage)}: current, skipped", flush=True)
                continue
            started += 1
            yield stage

    def run(self, stage: Stage) -> None:
        """Does a stage's work, in a thread, and records what it was made from."""
        if self._alone:
            print(f"{self._title(stage)} ...", flush=True)
        begun = time.monotonic()
        stage.run()
        self._record(stage).write_text(stage.fingerprint)
        seconds = time.monotonic() - begun
        if stage.cost > 1:  # The others are not of the kind that takes the time.
            self._spent += seconds
            self._worked += stage.cost
        self._finished.add(stage.name)
        left = self._spent / max(self._worked, 1) * sum(s.cost for s in self.waiting) / self._jobs
        told = stage.cost > 1 and left > _LEAST_LEFT
        about = f", about {left / 60:.0f} min left" if told else ""
        print(f"{self._title(stage)}: {seconds:.0f} s{about}", flush=True)

    def done(self, stage: Stage, future: Future[None]) -> None:
        """Raises what a stage has raised, with its name."""
        try:
            future.result()
        except StageError as error:
            raise StageError(f"stage '{stage.name}' failed; {error}") from None

    def _is_current(self, stage: Stage) -> bool:
        record = self._record(stage)
        return stage.output.exists() and record.exists() and record.read_text() == stage.fingerprint

    def _record(self, stage: Stage) -> Path:
        return self._records / stage.name.replace(" ", "-").replace("/", "-")

    def _title(self, stage: Stage) -> str:
        number = len(self._finished | {stage.name})
        return f"[{number}/{self._total}] {stage.name}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, which commands inherit: it is held until the last has ended."""
    with (folder / ".stages" / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(
                f"another process works in {folder}, or one that was killed has left its commands "
                "running: wait for them, or end them"
            ) from None
        yield


_commands: set[subprocess.Popen[str]] = set()
_commands_lock = threading.Lock()


def execute(
    command: Sequence[object], log: Path | None = None, see: Callable[[str], None] | None = None
) -> None:
    """Runs a command to its end.

    Args:
        command: its words.
        log: a file for its output, which otherwise goes where this process's goes.
        see: is given each line of the output that goes to the log.

    Raises:
        StageError: it failed. With a log, the text has what the log says of it.
    """
    words = [str(word) for word in command]
    # One thread a process: processes share the cores.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    output = {} if log is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # A session of its own lets `_end_commands` end what the command has started, too.
    options = {"text": True, "env": environment, "close_fds": False, "start_new_session": True}
    with subprocess.Popen(words, **options, **output) as process:  # type: ignore[call-overload]
        with _commands_lock:
            _commands.add(process)
        if log is not None:
            with log.open("w") as file:
                for line in process.stdout:
                    file.write(line)
                    if see is not None:
                        see(line)
    _commands.discard(process)
    if process.returncode:
        said = "see above" if log is None else f"{first_error(log)}\nfull output: {log}"
        raise StageError(f"status {process.returncode}; {said}")


def _end_commands() -> None:
    with _commands_lock:
        for process in _commands:
            with contextlib.suppress(ProcessLookupError):  # It has just ended.
                os.killpg(process.pid, signal.SIGKILL)


def first_error(log: Path, lines: int = 40) -> str:
    """The part of a log that explains its failure, rather than the launcher's summary of it."""
    text = log.read_text().splitlines()
    for number, line in enumerate(text):
        if line.startswith("error: ") and not line.endswith(":"):  # A traceback follows that.
            return line
        if "Traceback (most recent call last)" in line:
            return "\n".join(text[number : number + lines])
    return "\n".join(text[-lines:])


def python(script: Path, *args: object) -> None:
    """Runs a script with this interpreter."""
    execute([sys.executable, script, *args])


def interrupted_by_sigterm() -> None:
    """Lets SIGTERM end this process as Ctrl-C does, its commands included."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
