"""Unfinished work that an interrupted call leaves behind for the same call to go on with."""

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_rw.data.progress import say
from megatron_rw.errors import UserError
from megatron_rw.platform.files import write_json

FOLDER = ".preprocess_data"
_DOOMED = f"{FOLDER}-done"
_SETTINGS = "settings.json"


@contextmanager
def work_folder(output_dir: Path, settings: Mapping[str, Any], restart: bool) -> Iterator[Path]:
    """Makes or finds the folder of unfinished work, for one process at a time.

    `settings` is everything that decides what is in it, by the flag's name; with `restart`, what
    was made with other settings is dropped. The folder stays if the body raises or the process
    dies, and is removed otherwise. Raises a `UserError` if another process works there, or what is
    there was made with other settings.
    """
    settings = json.loads(json.dumps(settings))  # lists, as in the file, not tuples
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (output_dir / f"{FOLDER}.lock").open("w") as lock:
        _lock(lock, output_dir)
        held = _held_settings(folder)
        if held not in (None, settings):
            if not restart:
                raise _other_settings(output_dir, settings, held)
            _remove(folder)
            folder.mkdir()
        write_json(folder / _SETTINGS, settings)
        yield folder
        _remove(folder)
        (output_dir / f"{FOLDER}.lock").unlink()


def _lock(file: TextIO, output_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"--output-dir {output_dir}: another process is writing there; wait for it, or "
            "give another directory"
        ) from error
    except OSError as error:
        # So do Lustre without its mount option flock, and NFS without its lock daemon.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        say(
            "preprocess_data",
            f"the file system of {output_dir} has no locks ({error.strerror}): make sure "
            "that no other process writes there",
        )


def _remove(folder: Path) -> None:
    """Removes the folder, under another name, so that it is never there in part."""
    folder.rename(doomed := folder.with_name(_DOOMED))
    shutil.rmtree(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a call left behind that was killed while it removed its work.

    Raises a `UserError` if that call is not dead and removes it now.
    """
    if (doomed := output_dir / _DOOMED).is_dir():
        with (path := output_dir / f"{FOLDER}.lock").open("w") as lock:
            _lock(lock, output_dir)
            shutil.rmtree(doomed)
            path.unlink()


def earlier_chunk_bytes(output_dir: Path) -> int | None:
    """Returns the `chunk_bytes` of the unfinished work, which may have had fewer inputs."""
    held = _held_settings(output_dir / FOLDER)
    return None if held is None else int(held["chunk_bytes"])


def _held_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / _SETTINGS
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _other_settings(
    output_dir: Path, settings: Mapping[str, Any], held: Mapping[str, Any]
) -> UserError:
    different = [
        f"{name} is {json.dumps(settings.get(name))} now and was {json.dumps(held.get(name))}"
        for name in sorted(settings.keys() | held.keys())
        if settings.get(name) != held.get(name)
    ]
    return UserError(
        f"--output-dir {output_dir}: holds unfinished work of another call: "
        f"{'; '.join(different)}; repeat that call, or --overwrite to drop it"
    )
