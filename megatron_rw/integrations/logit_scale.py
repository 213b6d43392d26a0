"""The factor on the logits that would make a model's validation loss lowest.

    a* = argmin_a mean_t CE(softmax(a·z_t), y_t)

Above 1, the predictions are flatter than the data asks for, as weights that follow a token's own
loss make them; below 1, they are too sure. Nine factors are tried on every ninth position, which
costs about one more pass over the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megatron_rw.integrations.cross_entropy import mask_of
from megatron_rw.kernels import vocab_parallel_cross_entropy
from megatron_rw.patching import Around, Patch

SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6)
STRIDE = len(SCALES)


@dataclass(frozen=True)
class FittedScale:
    """The fit over an evaluation; losses in nats per token, over the positions that were tried."""

    logit_scale: float  # a*; an end of `SCALES` where the loss is lowest there.
    lm_loss_at_scale: float
    lm_loss_at_one: float  # With the logits as they are.


class LogitScale:
    """Sums the losses of scaled logits over an evaluation, on the device."""

    def __init__(self) -> None:
        # `[10]` fp64, the loss sum of each scale and the tokens.
        self._sums: Tensor | None = None

    def patches(self) -> list[Patch]:
        """Returns what looks at the logits that core's models compute."""
        why = "Core's models give their logits to this method alone."
        return [Patch(LanguageModule, "compute_language_model_loss", Around(self._see), why)]

    def _see(self, proceed: Callable[[], Tensor], call: dict[str, Any]) -> Tensor:
        module, logits = call["self"], call["logits"]
        if not module.training and mask_of(call["labels"]) is not None:
            some = logits[::STRIDE].float()
            self.add(
                call["labels"],
                lambda scale, target: (
                    vocab_parallel_cross_entropy(some * scale, target, module.tp_group).losses
                ),
            )
        return proceed()

    @torch.no_grad()
    def add(
        self, labels: Tensor, losses: Callable[[float, Tensor], Tensor], parts: int = 1
    ) -> None:
        """Adds a micro-batch, whose labels `[b, s]` have a mask (`announce_mask`).

        Args:
            labels: Those of all positions.
            losses: Computes `[s', b]` losses for a scale and labels `[s', b]`, those of every ninth
                position of each of the sequence's parts.
            parts: Over how many ranks the sequence is cut where positions are chosen.
        """
        mask = mask_of(labels)
        assert mask is not None
        target, mask = (
            torch.cat([part[::STRIDE] for part in whole.chunk(parts)])
            for whole in (labels.transpose(0, 1), mask)
        )
        # 0·NaN is NaN, so masked tokens are left out of the sum.
        sums = [torch.where(mask > 0, losses(a, target) * mask, 0.0).sum() for a in SCALES]
        new = torch.stack([*sums, mask.sum()]).double()
        self._sums = new if self._sums is None else self._sums + new

    def read(self, group: dist.ProcessGroup) -> FittedScale | None:
        """Returns the fit over a group, and starts again; None without a token.

        Collective; waits for the device. Either every rank of the group has added, or none has.
        """
        if self._sums is None:
            return None
        dist.all_reduce(self._sums, group=group)
        *sums, tokens = self._sums.tolist()
        self._sums = None
        return fitted([loss_sum / tokens for loss_sum in sums]) if tokens else None


def fitted(losses: list[float]) -> FittedScale:
    """Returns the lowest point of the parabola through the lowest loss and its two neighbours.

    `losses` are those at `SCALES`. Where the first or the last is lowest, it is returned itself.
    """
    best = int(np.argmin(losses))
    at_one = losses[SCALES.index(1.0)]
    if not 0 < best < len(SCALES) - 1:
        return FittedScale(SCALES[best], losses[best], at_one)
    near = slice(best - 1, best + 2)
    curve = np.polyfit(SCALES[near], losses[near], 2)
    scale = float(-curve[1] / (2 * curve[0]))
    return FittedScale(scale, float(np.polyval(curve, scale)), at_one)
