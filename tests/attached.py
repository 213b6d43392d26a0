"""The stock script with sample reweighting attached, as a user adds it to an own script."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from tests import stock


def attached(forward_step: Any, args: Namespace) -> Any:
    """The lines that docs/attach.md shows."""
    from megatron_rw.integrations import attach
    from megatron_rw.reweighting import ReweightConfig

    config = ReweightConfig(strategy="linupper", temperature=0.4, scope="global", warmup_steps=4)
    return attach(forward_step, config, args=args)


def main() -> None:
    stock.main(attached)
