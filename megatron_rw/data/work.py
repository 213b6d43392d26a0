"""Unfinished work that an interrupted call leaves behind for the same call to go on with."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rw.data.command import InputError

FOLDER = ".preprocess_data"
_SETTINGS = "settings.json"


@contextmanager
def work_folder(output_dir: Path, settings: Mapping[str, Any], restart: bool) -> Iterator[Path]:
    """Makes or finds the folder of unfinished work; one process at a time has it.

    Args:
        output_dir: where it is, under a hidden name.
        settings: everything that decides what is in it, by the flag's name; values of JSON.
        restart: whether to drop what is there.

    Yields:
        The folder. It stays if the body raises or the process dies, and is removed otherwise.

    Raises:
        InputError: another process works there, or what is there was made with other settings.
    """
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (output_dir / f"{FOLDER}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--output-dir {output_dir}: another process is writing there; wait for it, or "
                "give another directory"
            ) from error
        if restart:
            shutil.rmtree(folder)
            folder.mkdir()
        _check_settings(folder / _SETTINGS, settings)
        yield folder
        shutil.rmtree(folder)
        (output_dir / f"{FOLDER}.lock").unlink()


def earlier_chunk_bytes(output_dir: Path) -> int | None:
    """The `chunk_bytes` of the unfinished work, as it may have been begun with fewer inputs."""
    path = output_dir / FOLDER / _SETTINGS
    if not path.is_file():
        return None
    return int(json.loads(path.read_text("utf-8"))["chunk_bytes"])


def differences(mine: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as `name a here, b there`."""
    return [
        f"{name} is {json.dumps(mine.get(name))} now and was {json.dumps(others.get(name))}"
        for name in mine.keys() | others.keys()
        if mine.get(name) != others.get(name)
    ]


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    if path.is_file():
        if different := differences(settings, json.loads(path.read_text("utf-8"))):
            raise InputError(
                f"--output-dir {path.parent.parent}: holds unfinished work of another call: "
                f"{'; '.join(sorted(different))}; repeat that call, or --overwrite to drop it"
            )
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(settings), indent=2) + "\n", "utf-8")
    partial.replace(path)
