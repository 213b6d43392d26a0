"""The CPU platform: Megatron's CUDA names land on the CPU, and its optimizer is torch's AdamW."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from megatron_rw.platform.cpu_adam import CPUAdam
from tests.ranks import run_ranks


def test_redirects_hide_no_gpu_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rw.platform import cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_active", False)
    with pytest.raises(RuntimeError, match="pass --device cpu to mean it"):
        cpu.activate()


def cuda_names_on_the_cpu() -> dict[str, Any]:
    module = torch.nn.Linear(2, 2)
    before = torch.get_rng_state()
    iter(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(3))))
    undisturbed = torch.equal(before, torch.get_rng_state())
    torch.cuda.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    return {
        "devices": [
            torch.zeros(1, device="cuda").device.type,
            torch.tensor([1.0], device="cuda:0").device.type,
            torch.empty(1, device=torch.device("cuda", 0)).device.type,
            torch.ones(1, device=torch.cuda.current_device()).device.type,
            torch.zeros(1).cuda(non_blocking=True).device.type,
            module.cuda(torch.cuda.current_device()).weight.device.type,
            module.to(device="cuda").weight.device.type,
            module.to("cuda", torch.float64).weight.device.type,
        ],
        "dtype": module.weight.dtype,
        "types": [torch.zeros(1).type(), torch.zeros(1, dtype=torch.bfloat16).type()],
        "converted": torch.zeros(1).type(torch.int64).dtype,
        "loader draws nothing": undisturbed,
        "one generator": torch.equal(drawn, torch.rand(2)),
        "memory": torch.cuda.memory_allocated() > 1 << 20,
    }


def test_cuda_names_land_on_the_cpu() -> None:
    [seen] = run_ranks(1, cuda_names_on_the_cpu)
    assert set(seen["devices"]) == {"cpu"}
    assert seen["dtype"] is torch.float64
    assert seen["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
    assert seen["converted"] is torch.int64
    assert seen["loader draws nothing"]
    assert seen["one generator"]
    assert seen["memory"]


def unknown_defaults() -> list[str]:
    """The platform's defaults that Megatron's parser has no argument for."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_rw.platform import cpu

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    return sorted(set(cpu.ARGUMENT_DEFAULTS) - known)


def test_every_default_is_an_argument_of_megatron() -> None:
    # set_defaults takes any name in silence, so that a renamed argument would go unnoticed.
    assert run_ranks(1, unknown_defaults) == [[]]


@pytest.mark.parametrize("decoupled", [True, False])
def test_cpu_adam_is_torchs(decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    mine = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    # The second group has no parameters: it must not count steps.
    groups = [{"params": mine}, {"params": []}]
    ours = CPUAdam(groups, adam_w_mode=decoupled, **settings)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        theirs, fused=True, **settings
    )
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    assert ours.param_groups[0]["step"] == 4
    assert "step" not in ours.param_groups[1]
    assert all("step" not in state for state in ours.state.values())


def test_cpu_adam_refuses_cuda_graphs() -> None:
    with pytest.raises(ValueError, match="--optimizer-cuda-graph"):
        CPUAdam([torch.nn.Parameter(torch.zeros(1))], capturable=True)


def test_only_expected_messages_are_silenced() -> None:
    from megatron_rw.platform.quiet import silence

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence("cpu")
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("your loss is odd", stacklevel=1)
    assert [str(w.message) for w in caught] == ["your loss is odd"]
