"""Holds every rank of the real program for ever in its third step, however fast the machine is."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any


def hold(folder: Path) -> None:
    """Leaves `held-<rank>` in the folder then, and `noticed-<rank>` after a signal to end."""
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.training import get_args
    from megatron.training.global_vars import get_signal_handler

    rank = os.environ["RANK"]
    forward = TransformerBlock.forward

    @functools.wraps(forward)
    def held(*args: Any, **kwargs: Any) -> Any:
        if get_args().curr_iteration + 1 == 3:
            (folder / f"held-{rank}").touch()
            while not get_signal_handler()._signal_received:
                time.sleep(0.01)
            (folder / f"noticed-{rank}").touch()
            while True:
                time.sleep(1.0)
        return forward(*args, **kwargs)

    TransformerBlock.forward = held
