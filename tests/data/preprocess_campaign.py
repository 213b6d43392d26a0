"""Kill tools/preprocess_data.py at random points, repeat the call, compare with an undisturbed one.

    python -m tests.data.preprocess_campaign --points 30 --seed 0

Every trial sends SIGKILL to all processes of the tool, to one worker or to the parent alone: at any
time; when so many parts are there; when a worker has a part that has no name yet; between pieces of
the joined datasets; before or after a rename to a final name; or while finished work is removed.
Then the same command is repeated until it succeeds. Whatever has its final name must be
complete at any time; in the end all files must be those of the undisturbed run, byte for byte, and
no other; no process may be left; and no part that was there may be made again. Prints a line a
trial and the count. Exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from backports import zstd

from megatron_rw.data import train_tokenizer
from megatron_rw.data.indexed.domains import FILE_NAME, DomainsFile
from megatron_rw.data.resume import FOLDER
from tests.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
WHO = ("group", "worker", "parent")
# Where the tool is when workers are at work, and where it is alone.
WITH_WORKERS = ("any time", "parts", "part")
# How far `count` may go for the point to be there still, with 12 MB and either variant.
COUNTS = {"any time": 1000, "parts": 12, "part": 4, "join": 14, "rename": 18, "cleanup": 25}
VARIANTS = {"one field": [], "two fields": ["--json-keys", "text", "title"]}
BAD = [b"no json\n", b'{"txt": "no text"}\n', b'{"text": 1}\n', b"\xff\n", b'{"text": ""}\n']
WORKERS, LOG = 2, "parts.log"
# What a repeated call says if the earlier one was killed when it had only to end.
COMPLETE = "holds datasets already"
# What it says if a worker was killed.
WORKER_KILLED = "a worker process was killed"
# How long a call may take at most, and processes that are left to notice; and how often it may
# have to be repeated.
PATIENCE_S, NOTICE_S, ATTEMPTS = 120.0, 20.0, 3


@dataclass(frozen=True)
class Kill:
    """What happens to a call of a variant, at a point of `COUNTS`: who of `WHO` is killed."""

    variant: str
    point: str
    # How often the point is passed before; for `parts` the parts that are there; for `any time`
    # thousandths of the undisturbed call's time from when it has all workers.
    count: int
    who: str

    def __str__(self) -> str:
        return f"{self.variant:11}{self.point:9}{self.count:>4}  {self.who:6}"


def kills(seed: int, points: int) -> Iterator[Kill]:
    """Yields random ones, of every kind of point in turn."""
    rng = random.Random(seed)
    for point in itertools.islice(itertools.cycle(COUNTS), points):
        who = rng.choice(WHO if point in WITH_WORKERS else ("group", "parent"))
        yield Kill(rng.choice(list(VARIANTS)), point, rng.randrange(COUNTS[point]), who)


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    # Exit status, negative if killed; None if it took too long.
    status: int | None
    # Time from when it had all workers.
    seconds: float
    error: str
    # Number of its processes that were still there a while after.
    left: int
    # Parts that were completed.
    made: list[str]


class Campaign:
    """Runs trials in a folder, with a tokenizer model and so many megabytes of text."""

    def __init__(self, folder: Path, model: str, megabytes: float) -> None:
        self._folder = folder
        self._model = model
        self._inputs = folder / "inputs"
        self._output = folder / "output"  # the same for all, as blend.txt names it
        write_inputs(self._inputs, megabytes)
        self._expected: dict[str, tuple[Path, float]] = {}

    def trial(self, kill: Kill) -> str:
        """Returns what came of it: `ok` and how, or what went wrong."""
        expected, seconds = self.undisturbed(kill.variant)
        shutil.rmtree(self._output, ignore_errors=True)
        ended = self._call(kill, seconds)
        reached = ended.status != 0
        if reached and kill.who == "worker" and WORKER_KILLED not in ended.error:
            return f"UNEXPLAINED: status {ended.status}: {ended.error[-300:]}"
        attempts, reused = 1, 0
        while True:
            if ended.status is None:
                return (
                    f"HUNG: attempt {attempts} took over {PATIENCE_S:.0f} s: {ended.error[-300:]}"
                )
            if ended.left:
                return f"STRAY: {ended.left} processes {NOTICE_S:.0f} s after"
            if problem := incomplete(expected, self._output):
                return f"INCOMPLETE after attempt {attempts}: {problem}"
            if ended.status == 0 or (attempts > 1 and COMPLETE in ended.error):
                break
            if attempts > ATTEMPTS:
                return f"LOST: status {ended.status}: {ended.error[-1000:]}"
            attempts += 1
            there = set(map(str, self._output.rglob("*.npz")))
            ended = self._call(Kill(kill.variant, "none", 0, ""), seconds)
            again = there & set(ended.made)
            reused += len(there - again)
            if again:
                return f"REDONE: {len(again)} of {len(there)} parts that were there"
        if problem := differences(expected, self._output):
            return f"WRONG: {problem}; status {ended.status} {ended.error[-300:].strip()}"
        if not reached:
            return "ok, not reached"
        return f"ok, {attempts} attempts, {reused} parts reused"

    def undisturbed(self, variant: str) -> tuple[Path, float]:
        """Returns the files of a call that nobody disturbs, and the seconds that it takes."""
        if variant not in self._expected:
            shutil.rmtree(self._output, ignore_errors=True)
            ended = self._call(Kill(variant, "none", 0, ""), PATIENCE_S)
            if ended.status != 0:
                raise SystemExit(f"error: undisturbed, status {ended.status}:\n{ended.error}")
            kept = self._folder / f"expected {variant}"
            self._output.rename(kept)
            self._expected[variant] = (kept, ended.seconds)
        return self._expected[variant]

    def _call(self, kill: Kill, undisturbed_s: float) -> Ended:
        log, errors = self._folder / LOG, self._folder / "stderr"
        log.write_text("")
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PARTS_LOG": str(log),
            "KILL": json.dumps({"point": kill.point, "count": kill.count, "who": kill.who}),
        }
        command = [
            *(sys.executable, "-m", "tests.data.killed", "--input", str(self._inputs)),
            *("--output-dir", str(self._output), "--tokenizer-model", self._model),
            *("--append-eod", "--dedup", "exact", "--max-bad-fraction", "0.1"),
            *("--workers", str(WORKERS), *VARIANTS[kill.variant]),
        ]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        watch = threading.Timer(PATIENCE_S, os.killpg, (process.pid, signal.SIGKILL))
        watch.start()
        workers = _workers(process)
        start = time.monotonic()
        self._disturb(process, workers, kill, undisturbed_s)
        process.wait()
        status = None if watch.finished.is_set() else process.returncode
        watch.cancel()
        seconds = time.monotonic() - start
        left = _wait_for_the_rest(process.pid)
        return Ended(status, seconds, errors.read_text(), left, log.read_text().split("\n")[:-1])

    def _disturb(
        self,
        process: subprocess.Popen[bytes],
        workers: list[psutil.Process],
        kill: Kill,
        undisturbed_s: float,
    ) -> None:
        """Kills from outside, at the points that the process itself does not know."""
        if kill.point == "any time":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(kill.count / 1000 * undisturbed_s)
                return
        elif kill.point == "parts":
            while len((self._folder / LOG).read_text().splitlines()) <= kill.count:
                if process.poll() is not None:
                    return
                time.sleep(0.002)
        else:
            return
        if kill.who == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif kill.who == "parent":
            process.kill()
        else:
            worker = random.Random(kill.count).choice(workers)
            if worker.is_running():
                worker.kill()


def _workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Returns the workers of a call, once it has all of them; none if it ends before."""
    while process.poll() is None:
        workers = psutil.Process(process.pid).children()
        if len(workers) == WORKERS:  # fewer may be what an import starts for a moment
            return workers
        time.sleep(0.02)
    return []


def _wait_for_the_rest(group: int) -> int:
    """Waits until no process of a group is left; returns how many still are after a while."""
    deadline = time.monotonic() + NOTICE_S
    while True:
        left = 0
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                left += os.getpgid(process.pid) == group
        if left and time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
        elif left:
            time.sleep(0.02)
            continue
        return left


def write_inputs(folder: Path, megabytes: float) -> None:
    """Writes a plain file and two compressed ones, of a third of the text each."""
    folder.mkdir()
    for seed, name in enumerate(("code.jsonl", "math.jsonl.gz", "wiki.jsonl.zst")):
        content = _lines(random.Random(seed), megabytes * 1e6 / 3)
        if name.endswith(".gz"):
            content = gzip.compress(content, 1, mtime=0)
        elif name.endswith(".zst"):
            content = zstd.compress(content)
        (folder / name).write_bytes(content)


def _lines(rng: random.Random, size: float) -> bytes:
    """Documents of which a tenth are in every file, with a bad line in a thousand."""
    everywhere = make_texts(100, 0)
    lines: list[bytes] = []
    written = 0
    while written < size:
        text = "\n".join(make_texts(8, rng.randrange(1 << 30)))
        if rng.random() < 0.1:
            text = rng.choice(everywhere)
        lines.append(json.dumps({"text": text, "title": text[:40]}).encode() + b"\n")
        if rng.random() < 0.001:
            lines.append(rng.choice(BAD))
        written += len(text)
    return b"".join(lines)


def incomplete(expected: Path, found: Path) -> str | None:
    """Returns what is wrong with a directory's files that have their final names, if anything."""
    for path in sorted(found.rglob("*")):
        relative = path.relative_to(found)
        if path.suffix in (".bin", ".idx") and FOLDER not in relative.parts:
            if path.read_bytes() != (expected / relative).read_bytes():
                return f"{relative} is not that of the undisturbed run"
        elif path.name == FILE_NAME:
            for record in DomainsFile.load(path).domains.values():
                for suffix in (".bin", ".idx"):
                    if not path.with_name(record.prefix + suffix).exists():
                        return f"{relative} lists {record.prefix}{suffix}, which is not there"
    return None


def differences(expected: Path, found: Path) -> str | None:
    """Returns the first file that is in one directory alone or differs, hidden ones included."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (expected, found)
    ]
    for name in sorted(names[0] ^ names[1]):
        return f"{name} is {'missing' if name in names[0] else 'left behind'}"
    for name in sorted(names[0]):
        if (expected / name).read_bytes() != (found / name).read_bytes():
            return f"{name} differs"
    return None


def main() -> int:
    """Runs the campaign and prints a line a trial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=12.0, help="of text")
    options = parser.parse_args()
    failed = done = 0
    with tempfile.TemporaryDirectory(prefix="preprocess-campaign-") as name:
        texts = [{"text": text} for text in make_texts(300, 0)]
        flags = ["--input", str(write_jsonl(Path(name, "t.jsonl"), texts)), "--vocab-size", "400"]
        train_tokenizer.main([*flags, "--output-prefix", f"{name}/bpe"])
        campaign = Campaign(Path(name), f"{name}/bpe.model", options.megabytes)
        for number, kill in enumerate(kills(options.seed, options.points)):
            outcome = campaign.trial(kill)
            print(f"{number:3}  {kill}  {outcome}", flush=True)
            done += 1
            failed += not outcome.startswith("ok")
    print(f"{done} trials with seed {options.seed}: {done - failed} ok, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
