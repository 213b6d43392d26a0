"""Files that are complete whenever they exist under their name."""

import os
from pathlib import Path

import pytest

from megatron_rw.platform.files import complete_file, write_complete


def test_it_has_its_name_only_when_all_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tracker.txt"
    on_disk: list[bytes] = []
    fsync, rename = os.fsync, Path.replace

    def look(descriptor: int) -> None:
        fsync(descriptor)
        on_disk.append((tmp_path / "tracker.txt.partial").read_bytes())
        assert not path.exists()

    def replace(self: Path, target: Path) -> Path:
        assert on_disk == ["100\n€".encode()]
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(Path, "replace", replace)
    write_complete(path, "100\n€")
    assert path.read_bytes() == "100\n€".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_when_writing_fails_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "tracker.txt"
    write_complete(path, "100")

    def interrupted() -> None:
        with complete_file(path) as file:
            file.write(b"2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "100"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "tracker.txt.partial").write_text("longer than what is written now")
    write_complete(tmp_path / "tracker.txt", "100")
    assert (tmp_path / "tracker.txt").read_text() == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["tracker.txt"]
