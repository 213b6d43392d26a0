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
from megatron_rw.data.resume import FOLDER, work_folder
from megatron_rw.data.text import chunks
from tests.data.conftest import Preprocess, datasets, files, make_texts, write_jsonl

Whole = Callable[..., dict[str, bytes]]


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
        assert run(inputs, tmp_path / "out") == 130
    assert not list((tmp_path / "out").glob("*_document.*"))
    return tmp_path / "out"


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def parts(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob(".preprocess_data/*/*.npz")}


@pytest.fixture
def whole(tmp_path: Path, inputs: list[Path], run: Preprocess) -> Whole:
    """Makes the datasets in a call that is not disturbed."""

    def make(flags: str = "") -> dict[str, bytes]:
        assert run(inputs, tmp_path / "undisturbed", flags) == 0
        return datasets(tmp_path / "undisturbed")

    return make


def parts_at_publication(call: Callable[[], int], out: Path) -> dict[Path, int]:
    """Repeats a call and returns the parts that are there when datasets get their names."""
    kept: dict[Path, int] = {}

    def look(*args: Any) -> None:
        kept.update(parts(out))
        publish(*args)

    with pytest.MonkeyPatch.context() as context:
        context.setattr("megatron_rw.data.preprocess_data.publish", look)
        context.setattr("megatron_rw.data.progress._SECONDS", 0.0)
        assert call() == 0
    return kept


@pytest.mark.parametrize("flags", ["", "--overwrite"])
def test_it_goes_on_from_its_parts(
    flags: str,
    inputs: list[Path],
    interrupted: Path,
    run: Preprocess,
    whole: Whole,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = parts(interrupted)
    assert len(before) == 25
    kept = parts_at_publication(lambda: run(inputs, interrupted, flags), interrupted)
    assert len(kept) > 30
    assert {path: kept[path] for path in before} == before
    lines = capsys.readouterr().err.splitlines()
    assert "going on from" in lines[0]
    assert lines[-2].endswith(" 100%, 0.0 s left")
    assert datasets(interrupted) == whole()
    assert not list(interrupted.glob(".*"))


def test_a_file_that_was_replaced_is_read_again(
    inputs: list[Path], interrupted: Path, run: Preprocess, whole: Whole
) -> None:
    write_jsonl(inputs[0], [{"text": text} for text in make_texts(30, 6)])
    assert run(inputs, interrupted) == 0
    assert datasets(interrupted) == whole()


@pytest.mark.parametrize("damage", ["bin", "npz", "gone"])
def test_a_part_that_the_power_failed_upon_is_made_again(
    inputs: list[Path], interrupted: Path, run: Preprocess, whole: Whole, damage: str
) -> None:
    path = sorted(parts(interrupted))[3]
    victim = path if damage == "npz" else path.with_suffix(".bin")
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(bytes(victim.stat().st_size))
    assert run(inputs, interrupted) == 0
    assert datasets(interrupted) == whole()


def test_the_last_part_of_a_compressed_file_is_kept_when_an_earlier_one_is_gone(
    tmp_path: Path, inputs: list[Path], run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr("megatron_rw.data.preprocess_data._join", interrupt)
        assert run(inputs[1], out) == 130
    sorted(parts(out))[2].unlink()
    before = parts(out)
    kept = parts_at_publication(lambda: run(inputs[1], out), out)
    assert {path: kept[path] for path in before} == before
    run(inputs[1], tmp_path / "undisturbed")
    assert datasets(out) == datasets(tmp_path / "undisturbed")


def test_another_call_is_refused_until_it_is_dropped(
    inputs: list[Path],
    interrupted: Path,
    run: Preprocess,
    whole: Whole,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(inputs, interrupted, "--append-eod") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --output-dir {interrupted}: holds unfinished work of")
    assert "--append-eod is true now and was false; repeat that call, or --overwrite" in error
    assert run(inputs, interrupted, "--append-eod --overwrite") == 0
    assert datasets(interrupted) == whole("--append-eod")


def test_a_call_killed_while_it_removes_its_work_can_be_repeated(
    inputs: list[Path],
    interrupted: Path,
    run: Preprocess,
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as context:
        context.setattr("megatron_rw.data.resume._remove", interrupt)
        assert run(inputs, interrupted) == 130
    shutil.rmtree(next((interrupted / FOLDER).glob("*/")))
    assert run(inputs, interrupted, "--append-eod") == 2
    assert run(inputs, interrupted) == 0
    assert datasets(interrupted) == whole()


def test_settings_outlive_the_parts_made_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(KeyboardInterrupt), work_folder(tmp_path, {"a": 1}, False) as folder:
        (folder / "parts").mkdir()
        interrupt()
    remove = shutil.rmtree

    def killed_after(path: Path) -> None:
        remove(path)
        interrupt()

    monkeypatch.setattr(shutil, "rmtree", killed_after)
    with contextlib.suppress(KeyboardInterrupt), work_folder(tmp_path, {"a": 2}, True):
        pass
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_settings_are_compared_as_json_holds_them(tmp_path: Path) -> None:
    settings = {"tokenizer": {"special_tokens": ("<a>", "<b>")}, "--domain": None}
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt), work_folder(tmp_path, settings, False):
            interrupt()


def test_two_calls_do_not_write_into_one_directory(
    inputs: list[Path], interrupted: Path, run: Preprocess, capsys: pytest.CaptureFixture[str]
) -> None:
    with (interrupted / f"{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(inputs, interrupted) == 2
    assert "another process is writing there; wait for it, or give" in capsys.readouterr().err


def test_a_file_system_without_locks_is_told_of(
    inputs: list[Path],
    interrupted: Path,
    run: Preprocess,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(inputs, interrupted) == 0
    assert f"{interrupted} has no locks" in capsys.readouterr().err


def test_shards_are_consecutive_files(tmp_path: Path, run: Preprocess) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        texts = make_texts(5 + 10 * (number % 3), number)
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", [{"text": text} for text in texts])
    assert run(tmp_path / "in", tmp_path / "whole") == 0
    joined = b""
    for shard in range(3):
        out = tmp_path / f"shard{shard}"
        assert run(tmp_path / "in", out, f"--shard {shard}/3") == 0
        joined += files(out)["in_text_document.bin"]
    assert joined == files(tmp_path / "whole")["in_text_document.bin"]
