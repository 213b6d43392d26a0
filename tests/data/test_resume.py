"""What an interrupted preprocess_data leaves behind, and what the next call makes of it."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rw.data.encoding import Encoder
from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.output import publish
from megatron_rw.data.resume import FOLDER
from megatron_rw.data.text import chunks
from tests.data.conftest import datasets, files, make_texts, preprocess, write_jsonl


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files of some twenty chunks each."""
    monkeypatch.setattr(chunks, "_SMALLEST", 300)
    monkeypatch.setattr(chunks, "_LARGEST", 300)
    records = [{"text": text} for text in make_texts(60, 5)]
    return [
        write_jsonl(tmp_path / "a.jsonl", records[:30]),
        write_jsonl(tmp_path / "b.jsonl.gz", records[30:]),
    ]


@pytest.fixture
def interrupted(
    tmp_path: Path, inputs: list[Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[object, ...]:
    """The flags of a call into `out` that was interrupted after some parts."""
    flags = (
        "--input", *inputs, "--output-dir", tmp_path / "out", "--tokenizer-model", model,
        "--workers", 1,
    )  # fmt: skip
    encode = Encoder._encode
    calls = []

    def interrupt(encoder: Encoder, *args: Any) -> Any:
        calls.append(args)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return encode(encoder, *args)

    with monkeypatch.context() as context:
        context.setattr(Encoder, "_encode", interrupt)
        assert preprocess(*flags) == 130
    assert not list((tmp_path / "out").glob("*_document.*"))
    return flags


def parts(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob(".preprocess_data/*/*.npz")}


def whole(tmp_path: Path, flags: tuple[object, ...]) -> dict[str, bytes]:
    position = flags.index("--output-dir")
    again = (*flags[: position + 1], tmp_path / "undisturbed", *flags[position + 2 :])
    assert preprocess(*again) == 0
    return datasets(tmp_path / "undisturbed")


def test_it_goes_on_from_its_parts(
    tmp_path: Path, interrupted: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = parts(tmp_path / "out")
    assert len(before) == 25
    kept: dict[Path, int] = {}

    def look(*args: Any) -> None:
        kept.update(parts(tmp_path / "out"))
        publish(*args)

    with pytest.MonkeyPatch.context() as context:
        context.setattr("megatron_rw.data.preprocess_data.publish", look)
        context.setattr("megatron_rw.data.progress._SECONDS", 0.0)
        assert preprocess(*interrupted) == 0
    assert len(kept) > 30
    assert {path: kept[path] for path in before} == before
    lines = capsys.readouterr().err.splitlines()
    assert "going on from" in lines[0]
    assert lines[-2].endswith(" 100%, 0.0 s left")
    assert datasets(tmp_path / "out") == whole(tmp_path, interrupted)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_file_that_was_replaced_is_read_again(
    tmp_path: Path, inputs: list[Path], interrupted: tuple[object, ...]
) -> None:
    write_jsonl(inputs[0], [{"text": text} for text in make_texts(30, 6)])
    assert preprocess(*interrupted) == 0
    assert datasets(tmp_path / "out") == whole(tmp_path, interrupted)


@pytest.mark.parametrize("damage", ["bin", "npz", "gone"])
def test_a_part_that_the_power_failed_upon_is_made_again(
    tmp_path: Path, interrupted: tuple[object, ...], damage: str
) -> None:
    path = sorted(parts(tmp_path / "out"))[3]
    victim = path if damage == "npz" else path.with_suffix(".bin")
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(bytes(victim.stat().st_size))
    assert preprocess(*interrupted) == 0
    assert datasets(tmp_path / "out") == whole(tmp_path, interrupted)


def test_the_last_part_of_a_compressed_file_is_kept_when_an_earlier_one_is_gone(
    tmp_path: Path, inputs: list[Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (
        "--input", inputs[1], "--output-dir", tmp_path / "out", "--tokenizer-model", model,
        "--workers", 1,
    )  # fmt: skip

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("megatron_rw.data.preprocess_data._join", interrupt)
        assert preprocess(*flags) == 130
    made = sorted(parts(tmp_path / "out"))
    made[2].unlink()
    before = parts(tmp_path / "out")
    kept: dict[Path, int] = {}

    def look(*args: Any) -> None:
        kept.update(parts(tmp_path / "out"))
        publish(*args)

    with monkeypatch.context() as context:
        context.setattr("megatron_rw.data.preprocess_data.publish", look)
        assert preprocess(*flags) == 0
    assert {path: kept[path] for path in before} == before
    assert datasets(tmp_path / "out") == whole(tmp_path, flags)


def test_another_call_is_refused_until_it_is_dropped(
    tmp_path: Path, interrupted: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess(*interrupted, "--append-eod") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --output-dir {tmp_path / 'out'}: holds unfinished work of")
    assert "--append-eod is true now and was false; repeat that call, or --overwrite" in error
    assert preprocess(*interrupted, "--append-eod", "--overwrite") == 0
    flags = (*interrupted, "--append-eod")
    assert datasets(tmp_path / "out") == whole(tmp_path, flags)


def test_a_call_that_replaces_goes_on_too(
    tmp_path: Path, interrupted: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess(*interrupted, "--overwrite") == 0
    assert "going on from" in capsys.readouterr().err


def test_what_is_in_its_place_is_left_there_unless_its_inputs_changed(
    tmp_path: Path,
    inputs: list[Path],
    interrupted: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("megatron_rw.data.resume._remove", interrupt)
        assert preprocess(*interrupted) == 130
        made = datasets(tmp_path / "out")
        assert made
        assert preprocess(*interrupted) == 130
        assert "everything was in its place already" in capsys.readouterr().err
        assert datasets(tmp_path / "out") == made
    write_jsonl(inputs[0], [{"text": text} for text in make_texts(30, 6)])
    assert preprocess(*interrupted) == 0
    assert datasets(tmp_path / "out") == whole(tmp_path, interrupted) != made


def test_two_calls_do_not_write_into_one_directory(
    tmp_path: Path, interrupted: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "out" / f"{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert preprocess(*interrupted) == 2
    assert "another process is writing there; wait for it, or give" in capsys.readouterr().err
    assert preprocess(*interrupted) == 0


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path,
    interrupted: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as context:
        context.setattr(fcntl, "flock", flock)
        assert preprocess(*interrupted) == 0
    assert f"{tmp_path / 'out'} has no locks ({os.strerror(code)})" in capsys.readouterr().err
    assert datasets(tmp_path / "out") == whole(tmp_path, interrupted)


# Never ends by itself, so that what is done to it meets it at work however busy the machine is.
HELD = """
import signal, sys
from megatron_rw.data.text import chunks
from megatron_rw.data.encoding import Encoder
from megatron_rw.data.preprocess_data import main

chunks._SMALLEST = chunks._LARGEST = 300
encode = Encoder._encode

def hold(encoder, source, chunk):
    while chunk.number >= 3:
        signal.pause()
    return encode(encoder, source, chunk)

Encoder._encode = hold
sys.exit(main())
"""


def start_held(flags: tuple[object, ...]) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A call that stops short of the fourth part of each input, and its two workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, *map(str, flags)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while True:
        workers = psutil.Process(process.pid).children()
        if len(workers) == 2:  # one alone may be what an import starts for a moment
            return process, workers
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_worker_is_an_error_and_a_killed_parent_leaves_nobody(
    tmp_path: Path, inputs: list[Path], model: str
) -> None:
    out = tmp_path / "out"
    flags = (
        "--input", *inputs, "--output-dir", out, "--tokenizer-model", model, "--workers", 2
    )  # fmt: skip
    process, workers = start_held(flags)
    while not parts(out):
        assert process.poll() is None
        time.sleep(0.02)
    workers[0].kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"a worker process was killed, most likely for lack of memory; use fewer" in error

    process, workers = start_held(flags)
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    process.communicate()
    assert not alive

    assert parts(out)
    assert preprocess(*flags) == 0
    assert datasets(out) == whole(tmp_path, flags)


def test_shards_are_consecutive_files(tmp_path: Path, model: str) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        texts = make_texts(5 + 10 * (number % 3), number)
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", [{"text": text} for text in texts])
    usual = (
        "--input", tmp_path / "in", "--tokenizer-model", model, "--workers", 1, "--domain", "all"
    )  # fmt: skip
    assert preprocess(*usual, "--output-dir", tmp_path / "whole") == 0
    joined = b""
    for shard in range(3):
        out = tmp_path / f"shard{shard}"
        assert preprocess(*usual, "--output-dir", out, "--shard", f"{shard}/3") == 0
        joined += files(out)["all_text_document.bin"]
        assert domains.DomainsFile.load(out / "domains.json").domains["all"].documents
    assert joined == files(tmp_path / "whole")["all_text_document.bin"]
