"""What an interrupted preprocess_data leaves behind, and what the next call makes of it."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.data.encoding import Encoder
from megatron_rw.data.indexed.output import publish
from megatron_rw.data.resume import FOLDER, remove_leftovers, work_folder
from megatron_rw.data.text import chunks
from megatron_rw.errors import UserError
from tests.data.conftest import Preprocess, make_texts, write_texts
from tests.data.datasets import datasets, files

type Check = Callable[..., None]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files of some twenty chunks each."""
    monkeypatch.setattr(chunks, "_SMALLEST", 300)
    monkeypatch.setattr(chunks, "_LARGEST", 300)
    texts = make_texts(60, 5)
    return [
        write_texts(tmp_path / "a.jsonl", texts[:30]),
        write_texts(tmp_path / "b.jsonl.gz", texts[30:]),
    ]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def out(
    tmp_path: Path, inputs: list[Path], run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The output directory of a call that was interrupted after some parts."""
    encode = Encoder._encode
    calls = []

    def encode_some(encoder: Encoder, *args: Any) -> Any:
        calls.append(args)
        return encode(encoder, *args) if len(calls) <= 25 else interrupt()

    with monkeypatch.context() as context:
        context.setattr(Encoder, "_encode", encode_some)
        run(inputs, tmp_path / "out", status=130)
    assert not list((tmp_path / "out").glob("*_document.*"))
    assert len(parts(tmp_path / "out")) == 25
    return tmp_path / "out"


def parts(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob(".preprocess_data/*/*.npz")}


@pytest.fixture
def check(inputs: list[Path], run: Preprocess) -> Check:
    """Checks that datasets are those of a call that is not disturbed."""

    def compare(out: Path, flags: str = "") -> None:
        run(inputs, out.parent / "undisturbed", flags)
        assert datasets(out) == datasets(out.parent / "undisturbed")
        assert not list(out.glob(".*"))

    return compare


def parts_at_publication(call: Callable[[], Any], out: Path) -> dict[Path, int]:
    """Repeats a call and returns the parts that are there when datasets get their names."""
    kept: dict[Path, int] = {}

    def look(*args: Any) -> None:
        kept.update(parts(out))
        publish(*args)

    with pytest.MonkeyPatch.context() as context:
        context.setattr("megatron_rw.data.preprocess_data.publish", look)
        call()
    return kept


@pytest.mark.parametrize("flags", ["", "--overwrite"])
def test_it_goes_on_from_its_parts(
    flags: str,
    inputs: list[Path],
    out: Path,
    run: Preprocess,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, told = parts(out), []
    monkeypatch.setattr("megatron_rw.data.progress._SECONDS", 0.0)
    kept = parts_at_publication(lambda: told.append(run(inputs, out, flags).err), out)
    assert len(kept) > 30
    assert {path: kept[path] for path in before} == before
    lines = told[0].splitlines()
    assert "going on from" in lines[0]
    assert lines[-2].endswith(" 100%, 0.0 s left")
    check(out)


@pytest.mark.parametrize("damage", ["bin", "npz", "gone", "input"])
def test_what_was_lost_or_replaced_is_made_again(
    inputs: list[Path], out: Path, run: Preprocess, check: Check, damage: str
) -> None:
    path = sorted(parts(out))[3]
    victim = path if damage == "npz" else path.with_suffix(".bin")
    if damage == "input":
        write_texts(inputs[0], make_texts(30, 6))
    elif damage == "gone":
        victim.unlink()
    else:  # as the file system leaves it when the power fails
        victim.write_bytes(bytes(victim.stat().st_size))
    run(inputs, out)
    check(out)


def test_the_last_part_of_a_compressed_file_is_kept_when_an_earlier_one_is_gone(
    tmp_path: Path, inputs: list[Path], run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr("megatron_rw.data.preprocess_data._join", interrupt)
        run(inputs[1], out, status=130)
    sorted(parts(out))[2].unlink()
    before = parts(out)
    kept = parts_at_publication(lambda: run(inputs[1], out), out)
    assert {path: kept[path] for path in before} == before
    run(inputs[1], tmp_path / "undisturbed")
    assert datasets(out) == datasets(tmp_path / "undisturbed")


def test_another_call_is_refused_until_it_is_dropped(
    inputs: list[Path], out: Path, run: Preprocess, check: Check
) -> None:
    error = run(inputs, out, "--append-eod", status=2).error
    assert error.startswith(f"error: --output-dir {out}: holds unfinished work of")
    assert "--append-eod is true now and was false; repeat that call, or --overwrite" in error
    run(inputs, out, "--append-eod --overwrite")
    check(out, "--append-eod")


def test_a_call_killed_while_it_removes_its_work_leaves_nothing_behind(
    inputs: list[Path], out: Path, run: Preprocess, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", interrupt)
        with contextlib.suppress(KeyboardInterrupt), work_folder(out, {"other": 1}, True):
            pass
        assert not (out / FOLDER).exists()
    run(inputs, out)
    check(out)


def test_what_a_living_call_removes_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / f"{FOLDER}-done" / "parts").mkdir(parents=True)
    with (tmp_path / f"{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing there"):
            remove_leftovers(tmp_path)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_compared_as_json_holds_them(tmp_path: Path) -> None:
    settings = {"tokenizer": {"special_tokens": ("<a>", "<b>")}, "--domain": None}
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt), work_folder(tmp_path, settings, False):
            interrupt()


def test_two_calls_do_not_write_into_one_directory(
    inputs: list[Path], out: Path, run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (out / f"{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run(inputs, out, status=2).error
    assert "another process is writing there; wait for it, or give" in refused

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert f"{out} has no locks" in run(inputs, out).err


def test_shards_are_consecutive_files(tmp_path: Path, run: Preprocess) -> None:
    for number in range(5):
        texts = make_texts(5 + 10 * (number % 3), number)
        write_texts(tmp_path / "in" / f"{number}.jsonl", texts)
    made = []
    for flags in ("", "--shard 0/3", "--shard 1/3", "--shard 2/3"):
        run(tmp_path / "in", tmp_path / "out", f"{flags} --overwrite")
        made.append(files(tmp_path / "out")["in_text_document.bin"])
    assert b"".join(made[1:]) == made[0]
