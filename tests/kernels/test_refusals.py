"""What the operations refuse, and which backend they choose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_rw import kernels
from megatron_rw.kernels import CrossEntropyOptions, Units, Weighting
from megatron_rw.kernels.options import BackendError
from megatron_rw.kernels.selection import check_backend, default_backend, use_backend
from tests.kernels import DEVICE
from tests.kernels.operations import VARIANTS, compare, inputs, run


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        CrossEntropyOptions(vocab_size=0)


LOGITS, TARGET, _ = inputs()
HIDDEN, WEIGHT = torch.randn(5, 3, 24, device=DEVICE), torch.randn(130, 24, device=DEVICE)
OPERANDS = {"hidden": HIDDEN, "weight": WEIGHT}
LOSSES = torch.arange(4.0, device=DEVICE)
GIVEN: dict[str, dict[str, Any]] = {
    "vocab_parallel_cross_entropy": {"logits": LOGITS, "target": TARGET},
    "linear_weighted_cross_entropy": {**OPERANDS, "target": TARGET, "logits_budget": 1 << 30},
    "loss_weights": {"losses": LOSSES, "strategy": "linupper", "temperature": 1.0},
    "weigh_units": {"units": Units(LOSSES), "weighting": Weighting(strategy="uniform")},
    "Weighting": {"strategy": "topk"},
}
BOTH, WEIGHTS, UNITS, SETTING = list(GIVEN)[:2], ["loss_weights"], ["weigh_units"], ["Weighting"]
LOSS, LAYER = BOTH[:1], BOTH[1:]
REFUSED: list[tuple[list[str], str, dict[str, Any]]] = [
    (BOTH, r"target \[s, b\]", {"target": TARGET.T}),
    (BOTH, r"loss_mask must be \[s, b\]", {"loss_mask": TARGET.T}),
    (BOTH, "target must hold labels, integers, not torch.bool", {"target": TARGET > 0}),
    (BOTH, "target must hold labels, .* not torch.float", {"target": TARGET.float()}),
    (BOTH, "vocab_size 131 does not fit", {"options": CrossEntropyOptions(vocab_size=131)}),
    (LOSS, r"logits must be \[s, b, v\]", {"logits": LOGITS[0]}),
    (LOSS, "logits must be float32, .* not torch.int64", {"logits": LOGITS.long()}),
    (LOSS, "has no elements", {"logits": LOGITS[:0], "target": TARGET[:0]}),
    (LAYER, r"weight must be \[v, h\] with the 24 hidden units", {"weight": WEIGHT.T}),
    (LAYER, r"bias must be \[v\], 130 values", {"bias": WEIGHT[1:, 0]}),
    (LAYER, "weight is torch.bfloat16 on .* hidden torch.float32", {"weight": WEIGHT.bfloat16()}),
    (LAYER, "weight must be float32, .*float8", {"weight": WEIGHT.to(torch.float8_e5m2)}),
    (LAYER, "has no elements", {"hidden": HIDDEN[:0], "target": TARGET[:0]}),
    (WEIGHTS, "signals must be 1-D", {"losses": LOSSES.view(2, 2)}),
    (WEIGHTS, "quantises the weights", {"losses": LOSSES.bfloat16()}),
    (WEIGHTS, "strategy 'best' gives no weights", {"strategy": "best"}),
    (WEIGHTS, "mask must be torch.bool", {"mask": LOSSES}),
    (WEIGHTS, "mask must be torch.bool", {"mask": LOSSES[1:] > 0}),
    (WEIGHTS, "mask must be on .*, not on meta", {"mask": (LOSSES > 0).to("meta")}),
    (WEIGHTS, "temperature must be one number", {"temperature": LOSSES}),
    (UNITS, "base must be torch.float32", {"units": Units(LOSSES, base=LOSSES.double())}),
    (UNITS, "counts must be torch.float32", {"units": Units(LOSSES, counts=LOSSES[1:])}),
    (UNITS, r"given must be \[5\]", {"given": LOSSES[:1]}),
    *(
        (WEIGHTS, "temperature must be a finite number above 1e-06", {"temperature": value})
        for value in (-1.0, 0.0, 1e-300, math.nan, math.inf)
    ),
    *(
        (WEIGHTS, "delta must be a finite number above 0", {"delta": value})
        for value in (-1.0, 0.0, math.nan, math.inf)
    ),
    *(
        (SETTING, f"{name} must be above 0 and at most 1", {name: value})
        for name in ("top_share", "target_ess")
        for value in (0.0, 1.01, math.nan)
    ),
    *((SETTING, "max_weight must be 1 or more", {"max_weight": c}) for c in (0.9, math.nan)),
]


@pytest.mark.parametrize(("functions", "message", "changes"), REFUSED)
def test_wrong_inputs_are_refused(
    functions: list[str], message: str, changes: dict[str, Any]
) -> None:
    for function in functions:
        with pytest.raises(ValueError, match=message):
            getattr(kernels, function)(**(GIVEN[function] | changes))


def test_fp64_is_torchs_alone_and_autocast_leaves_it(operation: str) -> None:
    options = VARIANTS["all"]
    data = inputs(torch.float64, options=options)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(*data, None, operation, options=options)
    compare(found, *data, options=options)
    with pytest.raises(ValueError, match="float64"):
        run(*data, "cuda", operation)
    units = Units(LOSSES.double())
    with pytest.raises(ValueError, match="float64"):
        kernels.weigh_units(units, Weighting(strategy="uniform"), backend_name="cuda")


def test_backend_is_chosen_by_call_variable_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("MEGATRON_RW_KERNELS", raising=False)
    assert (default_backend(cpu), default_backend(gpu)) == ("torch", "cuda")
    assert default_backend(gpu, torch.float64) == "torch"
    monkeypatch.setenv("MEGATRON_RW_KERNELS", "torch")
    assert default_backend(gpu) == check_backend(gpu) == "torch"
    use_backend("cuda")
    assert default_backend(cpu) == "cuda"
    use_backend(None)
    monkeypatch.setenv("MEGATRON_RW_KERNELS", "metal")
    with pytest.raises(BackendError, match="MEGATRON_RW_KERNELS=metal: choose one of torch, cuda"):
        default_backend(cpu)
