"""What somebody may have put into a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Planted:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)
