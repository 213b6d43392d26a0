"""The fitted logit scale against a scan in fp64, where logits exist and where they do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.nn import functional

from megatron_rw import patching
from megatron_rw.integrations import FusedOutputLayer, cross_entropy
from megatron_rw.integrations.logit_scale import FittedScale, LogitScale, fitted
from tests.integrations.test_output_layer import layer
from tests.ranks import run_ranks

SEQUENCE, SAMPLES, HIDDEN, VOCAB = 60, 4, 16, 40


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states `[s, b, h]`, weight, and labels and mask `[b, s]`, drawn at scale 0.83."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCE, SAMPLES, HIDDEN, generator=rng)
    weight = 0.5 * torch.randn(VOCAB, HIDDEN, generator=rng)
    probabilities = torch.softmax(0.83 * (hidden @ weight.T), dim=-1).flatten(0, 1)
    labels = torch.multinomial(probabilities, 1, generator=rng).view(SEQUENCE, SAMPLES).T
    mask = (torch.rand(SAMPLES, SEQUENCE, generator=rng) < 0.7).float()
    return hidden, weight, labels.contiguous(), mask


def loss_at(scale: float, positions: Tensor) -> float:
    hidden, weight, labels, mask = data()
    logits = scale * (hidden.double() @ weight.double().T)[positions].flatten(0, 1)
    losses = functional.cross_entropy(logits, labels.T[positions].flatten(), reduction="none")
    counts = mask.T[positions].flatten().double()
    return float((losses * counts).sum() / counts.sum())


def fit_on_rank(fused: bool) -> FittedScale | None:
    hidden, weight, labels, mask = data()
    size = parallel_state.get_tensor_model_parallel_world_size()
    own = weight.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    scale, group = LogitScale(), parallel_state.get_tensor_model_parallel_group()
    cross_entropy.announce_mask(labels, mask)
    whole = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if fused:
        made = layer()
        made.sequence_parallel = size > 1
        made.weight.data.copy_(own)
        part = hidden.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        common: dict[str, Any] = {"output_layer": made, "output_weight": None, "labels": labels}
        for training in (True, False):
            made.train(training)
            with torch.no_grad():
                FusedOutputLayer(8 << 20, logit_scale=scale)(
                    hidden_states=part * (3 if training else 1), scale_logits=lambda x: x, **common
                )
        return scale.read(whole)
    with torch.no_grad(), patching.applied([*cross_entropy.patches(), *scale.patches()]):
        for training in (True, False):
            module = SimpleNamespace(tp_group=group, training=training)
            LanguageModule.compute_language_model_loss(
                module, labels, (hidden if not training else 3 * hidden) @ own.T
            )
    return scale.read(whole)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_fit_is_that_of_a_scan_in_fp64(processes: int, fused: bool) -> None:
    positions = torch.arange(0, SEQUENCE, 9)
    if fused and processes > 1:
        # Those of each rank's part of the sequence.
        half = torch.arange(0, SEQUENCE // 2, 9)
        positions = torch.cat([half, half + SEQUENCE // 2])
    for found in run_ranks(processes, fit_on_rank, fused, tensor_model_parallel_size=processes):
        assert found.lm_loss_at_one == pytest.approx(loss_at(1.0, positions), rel=1e-6)
        scan = [0.6 + 0.002 * step for step in range(501)]
        best = min(scan, key=lambda a: loss_at(a, positions))
        assert found.logit_scale == pytest.approx(best, abs=0.01)
        assert found.lm_loss_at_scale == pytest.approx(loss_at(best, positions), abs=5e-4)


def test_an_end_of_the_range_is_reported_as_it_is() -> None:
    assert fitted([float(number) for number in range(9)]) == FittedScale(0.6, 0.0, 4.0)
    assert fitted([9.0 - number for number in range(9)]) == FittedScale(1.6, 1.0, 5.0)
