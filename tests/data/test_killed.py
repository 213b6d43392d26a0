"""preprocess_data is killed at a point of `killed`, and the call is then repeated.

    KILLS=36 SEED=0 pytest tests/data/test_killed.py     # that many random kills as well

SIGKILL goes to all processes of the tool, to one worker or to the parent alone. Whatever has its
final name must be complete at any time; in the end all files must be those of an undisturbed call,
byte for byte, and no other; no process may be left; and no part that was there may be made again.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from backports import zstd

from megatron_rw.data.indexed.domains import FILE_NAME
from tests.data.conftest import make_texts

ROOT = Path(__file__).resolve().parents[2]
KILLS, SEED = int(os.environ.get("KILLS", 0)), int(os.environ.get("SEED", 0))
# How far `count` may go for the point to be there still, with 12 MB. For `time` it is in
# thousandths of the undisturbed call's time.
COUNTS = {"time": 1000, "part": 4, "join": 14, "rename": 18, "cleanup": 25}
BAD = [b"no json\n", b'{"txt": "no text"}\n', b'{"text": 1}\n', b"\xff\n", b'{"text": ""}\n']
# What a repeated call says if the earlier one was killed when it had only to end.
COMPLETE = "holds datasets already"
# How long a call may take at most, and processes that are left to notice; and how often it may
# have to be repeated.
PATIENCE_S, NOTICE_S, ATTEMPTS = 120.0, 20.0, 3


@dataclass(frozen=True)
class Kill:
    """A kill, as `killed` takes it."""

    point: str
    count: int
    who: str


NOBODY = Kill("nowhere", 0, "")


def random_kills() -> Iterator[Kill]:
    """Yields kills at every kind of point in turn."""
    rng = random.Random(SEED)
    for point in itertools.islice(itertools.cycle(COUNTS), KILLS):
        who = rng.choice(["group", "parent", *(["worker"] if point == "part" else [])])
        yield Kill(point, rng.randrange(COUNTS[point]), who)


class Preprocessing:
    """Calls of the tool in a folder, and the files that an undisturbed one makes.

    With 1 MB of text there are as many parts as files: it is less than a chunk in each.
    """

    def __init__(self, folder: Path, model: str, megabytes: float) -> None:
        self.output, self._folder = folder / "output", folder
        self._command = [
            *(sys.executable, "-m", "tests.data.killed", "--input", str(folder / "inputs")),
            *("--output-dir", str(self.output), "--tokenizer-model", model, "--append-eod"),
            *("--dedup", "exact", "--max-bad-fraction", "0.1", "--workers", "2"),
        ]
        write_inputs(folder / "inputs", megabytes)
        started = time.monotonic()
        status, error, _ = self.call(NOBODY)
        assert status == 0, error
        self._seconds = time.monotonic() - started
        self.expected = tree(self.output)

    def call(self, kill: Kill) -> tuple[int, str, set[str]]:
        """Returns the exit status, standard error and the parts that were completed."""
        log, errors = self._folder / "log", self._folder / "errors"
        log.write_text("")
        if kill.point == "time":
            kill = replace(kill, count=int(kill.count * self._seconds))
        environment = os.environ | {"PARTS_LOG": str(log), "KILL": json.dumps(vars(kill))}
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                self._command, cwd=ROOT, env=environment, stderr=stderr, start_new_session=True
            )
        try:
            status = process.wait(PATIENCE_S)
            wait_for_the_rest(process.pid)
        except (TimeoutError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return status, errors.read_text(), set(log.read_text().splitlines())


def wait_for_the_rest(group: int) -> None:
    """Waits until no process of a group is left."""
    deadline = time.monotonic() + NOTICE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise TimeoutError(f"processes were left after {NOTICE_S:.0f} s")


def tree(folder: Path) -> dict[str, str]:
    """Returns the digest of each file below a folder, hidden ones included, by its path in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_complete(output: Path, expected: Mapping[str, str]) -> None:
    """Checks that what has its final name is complete, and nothing missing by a `domains.json`."""
    pairs = {name for name in expected if Path(name).suffix in (".bin", ".idx")}
    found = tree(output)
    for name in pairs & found.keys():
        assert found[name] == expected[name]
    for name in pairs - found.keys():
        assert not (output / name).with_name(FILE_NAME).exists()


def write_inputs(folder: Path, megabytes: float) -> None:
    """Writes a plain file and two compressed ones, which have documents and bad lines in common."""
    compress: dict[str, Callable[[bytes], bytes]]
    compress = {
        "code.jsonl": bytes,
        "math.jsonl.gz": gzip.compress,
        "wiki.jsonl.zst": zstd.compress,
    }
    folder.mkdir()
    for seed, (name, compressed) in enumerate(compress.items(), start=1):
        parts = [*make_texts(round(500 * megabytes), 0), *make_texts(round(1200 * megabytes), seed)]
        texts = ["\n".join(part) for part in itertools.batched(parts, 8)]
        lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
        random.Random(seed).shuffle(lines)
        (folder / name).write_bytes(compressed(b"".join(lines[:9] + BAD + lines[9:])))


@pytest.fixture(scope="module")
def preprocessing(tmp_path_factory: pytest.TempPathFactory, model: str) -> Preprocessing:
    return Preprocessing(tmp_path_factory.mktemp("killed"), model, 12.0 if KILLS else 1.0)


@pytest.mark.parametrize(
    "kill",
    [
        Kill("rename", 9, "group"),
        Kill("part", 1, "worker"),
        Kill("part", 1, "parent"),
        pytest.param(Kill("join", 2, "group"), marks=pytest.mark.long),
        *random_kills(),
    ],
    ids="{0.point} {0.count} {0.who}".format,
)
def test_repeating_the_call_completes_it(kill: Kill, preprocessing: Preprocessing) -> None:
    output, expected = preprocessing.output, preprocessing.expected
    shutil.rmtree(output, ignore_errors=True)
    status, error, _ = preprocessing.call(kill)
    assert status != 0 or kill.point == "time"
    assert kill.who != "worker" or "a worker process was killed" in error
    least_parts = {"part": kill.count, "join": 3, "rename": 3}.get(kill.point, 0)
    assert len(list(output.rglob("*.npz"))) >= least_parts
    attempts = 1
    while status != 0 and not (attempts > 1 and COMPLETE in error):
        assert attempts <= ATTEMPTS, error
        check_complete(output, expected)
        there = set(map(str, output.rglob("*.npz")))
        status, error, made = preprocessing.call(NOBODY)
        assert not there & made
        attempts += 1
    assert tree(output) == expected
