"""Starts a tool, or says in one line that this Python does not have the project."""

import importlib
import importlib.util
import sys


def start(module: str) -> None:
    """Runs `main()` of a module and ends with the status that it returns."""
    if importlib.util.find_spec("megatron_rw") is None:
        sys.exit(
            f"error: megatron_rw is not installed for {sys.executable}: run make setup, then "
            f".venv/bin/python {' '.join(sys.argv)}"
        )
    sys.exit(importlib.import_module(module).main())
