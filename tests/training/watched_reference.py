"""`pretrain_gpt_rw.py`, noting what the loss function is given of the reference.

Each rank with the loss writes `reference-<rank>.pt` beside `--log-dir`'s files: by micro-batch and
pass, whether it only scores, the labels, the reference's token losses and the model's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

Note = tuple[bool, torch.Tensor, torch.Tensor, torch.Tensor]


def main() -> None:
    """Run the program, and write the notes when it ends."""
    from megatron.training import get_args

    import pretrain_gpt_rw
    from megatron_rw.training.loss import PretrainLoss

    original, notes = PretrainLoss._weighted, []

    def weighted(self: Any, reweighting: Any, batch: Any, mask: Any, losses: Any) -> Any:
        given = reweighting.reference_losses()
        assert given.dtype == torch.float32
        assert not given.requires_grad
        notes.append((reweighting.scoring, batch.labels.clone(), given, losses.detach().clone()))
        return original(self, reweighting, batch, mask, losses)

    setattr(PretrainLoss, "_weighted", weighted)  # noqa: B010
    pretrain_gpt_rw.main()
    if notes:
        folder = Path(get_args().log_dir)
        torch.save(notes, folder / f"reference-{os.environ['RANK']}.pt")
