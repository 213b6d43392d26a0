"""The place of our cross-entropy in core's language models."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_rw import patching
from megatron_rw.integrations import cross_entropy
from megatron_rw.kernels import sample_sums


def test_sums_of_the_samples_ride_on_the_losses() -> None:
    module = SimpleNamespace(tp_group=None)
    labels, logits = torch.randint(0, 50, (3, 8)), torch.randn(8, 3, 50)
    mask = (torch.rand(3, 8) > 0.3).float()
    cores = LanguageModule.compute_language_model_loss
    with patching.applied(cross_entropy.patches()):
        plain = LanguageModule.compute_language_model_loss(module, labels, logits)
        cross_entropy.announce_mask(labels, mask)
        losses = LanguageModule.compute_language_model_loss(module, labels, logits)
    assert LanguageModule.compute_language_model_loss is cores
    assert torch.equal(losses, plain)
    # Not made again: a mask of zeros would give zeros.
    ridden = cross_entropy.sums_of(losses, torch.zeros_like(mask))
    for made, wanted in zip(ridden, sample_sums(plain, mask), strict=True):
        torch.testing.assert_close(made, wanted)
    assert cross_entropy.sums_of(plain, torch.zeros_like(mask)).loss_sum.eq(0).all()
