"""The method in Megatron core's schedules: what `pretrain_gpt_rw.py` uses, and `attach` for others.

Imports `megatron.core`, and `megatron.training` only for a script that is built on it.
"""

from megatron_rw.integrations.attach import AttachedForwardStep, attach, bound_loss_mask
from megatron_rw.integrations.output_layer import FusedOutputLayer

__all__ = ["AttachedForwardStep", "FusedOutputLayer", "attach", "bound_loss_mask"]
