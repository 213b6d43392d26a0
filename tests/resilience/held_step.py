"""The real program, in whose third step every rank stays for ever, however fast the machine is.

A rank that has come there leaves the file `held-<rank>` in the folder HELD, and `noticed-<rank>`
once it was told by a signal to end.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.training import get_args
    from megatron.training.global_vars import get_signal_handler

    folder, rank = Path(os.environ["HELD"]), os.environ["RANK"]
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
    import pretrain_gpt_rw

    pretrain_gpt_rw.main()
