"""`tools/find_python.sh`: a candidate counts when it runs, not when it exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"


def find(path: str, home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{path}:/usr/bin:/bin", "HOME": str(home)} | extra
    return subprocess.run([str(SCRIPT)], env=env, capture_output=True, text=True, check=False)


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def broken_names(folder: Path) -> None:
    """Every name on PATH that the script tries exists and fails, as pyenv's shims do."""
    for name in ("python3.12", "python3.13", "python3"):
        executable(folder / name, "exit 127")


def test_shim_that_fails_is_passed_over(tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    broken_names(shims)
    good = executable(tmp_path / ".pyenv/versions/3.12.9/bin/python", f'exec {sys.executable} "$@"')
    found = find(str(shims), tmp_path)
    assert found.stdout.strip() == str(good), found.stderr


def test_nothing_found_names_the_remedies(tmp_path: Path) -> None:
    broken_names(tmp_path / "shims")
    found = find(str(tmp_path / "shims"), tmp_path)
    assert found.returncode == 1
    assert "No usable Python 3.12 or newer" in found.stderr
    assert "make setup PYTHON=/path/to/python3.12" in found.stderr


def test_named_interpreter_wins_or_is_refused(tmp_path: Path) -> None:
    assert find("", tmp_path, PYTHON=sys.executable).stdout.strip() == sys.executable
    refused = find("", tmp_path, PYTHON=str(executable(tmp_path / "old", "exit 1")))
    assert refused.returncode == 1
    assert "does not run, is older than 3.12, or has no venv module" in refused.stderr
