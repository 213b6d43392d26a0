"""The real program, with one rank whose forward passes are slow."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

# Seconds added to the forward pass of a transformer block. It takes some 10 ms on an idle machine
# and some 100 ms on one that runs many tests.
SLOW_S = 0.3


def main() -> None:
    """Runs the program; SLOW_RANK names the rank."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    rank = os.environ["RANK"]
    forward = TransformerBlock.forward

    @functools.wraps(forward)
    def disturbed(*args: Any, **kwargs: Any) -> Any:
        if rank == os.environ.get("SLOW_RANK"):
            time.sleep(SLOW_S)
        return forward(*args, **kwargs)

    TransformerBlock.forward = disturbed
    import pretrain_gpt_rw

    pretrain_gpt_rw.main()
