"""A program of ours as its console script starts it, with a bug planted where the environment says.

PROGRAM names the module. BUG, if set, names what raises an error when it is called, as
`module:Class.name`, and ERROR the error's class.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import os
import sys
from typing import Any, NoReturn


def main() -> None:
    module, _, path = os.environ.get("BUG", "").partition(":")
    if module:
        *classes, name = path.split(".")
        owner = functools.reduce(getattr, classes, importlib.import_module(module))
        assert hasattr(owner, name)
        setattr(owner, name, _planted)
    sys.exit(importlib.import_module(os.environ["PROGRAM"]).main())


def _planted(*args: Any, **kwargs: Any) -> NoReturn:
    raise getattr(builtins, os.environ["ERROR"])("planted")
