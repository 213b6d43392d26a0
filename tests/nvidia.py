"""NVIDIA's own pretrain_gpt.py, run from the Megatron-LM checkout that MEGATRON_LM names."""

from __future__ import annotations

import os
import runpy
import sys

from tests.stock import ready


def main() -> None:
    """Run the script as `python pretrain_gpt.py` would."""
    ready()
    checkout = os.environ["MEGATRON_LM"]
    # Last, so that `megatron` stays the installed one and only the scripts beside it are found.
    sys.path.append(checkout)
    runpy.run_path(os.path.join(checkout, "pretrain_gpt.py"), run_name="__main__")
