"""The fused output layer as part of a model: operands, memory, main_grad, shared weights.

What it has in common with the cross-entropy is tested with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rw import kernels
from megatron_rw.kernels import BudgetError, CrossEntropyOptions
from tests.kernels import DEVICE, operations
from tests.kernels.operations import PLAIN, VARIANTS, budget, exact
from tests.ranks import run_ranks

# Two splits of 1024 columns at the most.
HIDDEN, VOCAB = 24, 1300
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def inputs(
    dtype: torch.dtype = torch.float32,
    columns: int = VOCAB,
    options: CrossEntropyOptions = PLAIN,
    device: str = DEVICE,
) -> list[Tensor]:
    """Hidden states, weight, bias, labels with some ignored, upstream gradients with some 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, HIDDEN), (columns, HIDDEN), (columns,)]
    made = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    _, *others = operations.inputs(shape=(4, 3, columns), options=options, device=device)
    return [made[0], made[1] / 2, made[2], *others]


def call(hidden: Tensor, weight: Tensor, target: Tensor, **how: Any) -> Tensor:
    """Losses, from two splits."""
    how = {"logits_budget": budget(hidden, len(weight), 1024)} | how
    return kernels.linear_weighted_cross_entropy(hidden, weight, target, **how).losses


def run(
    *data: Tensor, loss: Callable[..., Tensor] = call, **how: Any
) -> tuple[Tensor, list[Tensor]]:
    """Losses of what `inputs` gives, and gradients of hidden states, weight and bias."""
    *operands, target, upstream = data
    leaves = [tensor.detach().clone().requires_grad_() for tensor in operands]
    losses = loss(leaves[0], leaves[1], target, bias=leaves[2], **how)
    return losses.detach(), list(torch.autograd.grad(losses, leaves, upstream.to(losses.dtype)))


def wanted(*data: Tensor, options: CrossEntropyOptions = PLAIN) -> list[Tensor]:
    """The gradients in fp64."""
    hidden, weight, bias = (tensor.double() for tensor in data[:3])
    logits = functional.linear(hidden, weight, bias)
    of_logits = exact(logits, *data[3:], options=options).gradient
    rows = of_logits.flatten(0, 1)
    return [of_logits @ weight, rows.T @ hidden.flatten(0, 1), rows.sum(dim=0)]


def error(found: Iterable[Tensor], exactly: Iterable[Tensor]) -> float:
    """The largest, relative, of whole gradients: infinite where one is not a number."""
    pairs = zip(found, exactly, strict=True)
    errors = [float((one.double() - other).norm() / other.norm()) for one, other in pairs]
    return max(value if math.isfinite(value) else math.inf for value in errors)


@pytest.mark.parametrize("options", [PLAIN, VARIANTS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_fp64(
    options: CrossEntropyOptions, dtype: torch.dtype, name: Any
) -> None:
    data = inputs(dtype, options=options)
    _, gradients = run(*data, options=options, backend_name=name)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    assert error(gradients, wanted(*data, options=options)) < BOUND[dtype]


def two_operations(hidden: Tensor, weight: Tensor, target: Tensor, **bias: Tensor) -> Tensor:
    """A linear layer and the cross-entropy, which holds all logits, and writes over them."""
    logits = functional.linear(hidden, weight, **bias)
    return kernels.vocab_parallel_cross_entropy(logits, target, backend_name="torch").losses


def test_no_less_exact_than_the_layer_and_its_loss_apart() -> None:
    """In bf16, where both round, over eight splits."""
    data = inputs(torch.bfloat16, 8192)
    fused, apart = (run(*data, loss=loss)[1] for loss in (call, two_operations))
    for found, other, exactly in zip(fused, apart, wanted(*data), strict=True):
        assert error([found], [exactly]) < 1.1 * error([other], [exactly])


@pytest.mark.parametrize("fp32", [(0, 1, 2), (0,), (1, 2)], ids=["all", "hidden", "weight"])
@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast_casts_as_a_linear_layer(
    fp32: tuple[int, ...], backward_too: bool, name: Any
) -> None:
    """The operands that are fp32; gradients come back in the dtypes of the parameters."""
    data = inputs(torch.bfloat16)
    leaves = [
        (tensor.float() if number in fp32 else tensor.clone()).requires_grad_()
        for number, tensor in enumerate(data[:3])
    ]
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = call(leaves[0], leaves[1], data[3], bias=leaves[2], backend_name=name)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=backward_too):
        gradients = torch.autograd.grad(losses, leaves, data[4])
    assert losses.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]
    assert error(gradients, wanted(*data)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("why", ["ignored", "zero upstream"])
def test_nan_in_a_token_that_does_not_count_stays_there(why: str, name: Any) -> None:
    """Not even in the weight's gradient, a product over all tokens, is 0·NaN."""
    data = inputs()
    data[3][2, 1], data[4][2, 1] = 3, 0.0
    exactly = wanted(*data)
    data[0][2, 1] = math.nan
    if why == "ignored":
        data[3][2, 1], data[4][2, 1] = PLAIN.ignore_index, math.nan
    losses, gradients = run(*data, backend_name=name)
    assert not gradients[0][2, 1].any()
    assert error(gradients, exactly) < 2e-6
    assert why != "ignored" or losses[2, 1] == 0


def test_nan_that_counts_is_not_hidden(name: Any) -> None:
    data = inputs()
    data[0][2, 1, 0], data[3][2, 1], data[4][2, 1] = math.inf, 3, 0.5
    losses, gradients = run(*data, backend_name=name)
    assert not torch.isfinite(losses[2, 1])
    assert all(torch.isnan(gradient).any() for gradient in gradients)


def on_rank(sequence_parallel: bool) -> list[Tensor]:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    hidden, weight, bias, target, upstream = inputs(torch.float64, 2 * VOCAB, device="cpu")
    how: Any = {"logits_budget": budget(hidden, VOCAB, 1024, gathers=sequence_parallel)}
    if sequence_parallel:
        hidden = hidden.chunk(2)[group.rank()]
    mine = [part.chunk(2)[group.rank()] for part in (weight, bias)]
    how |= {"tp_group": group, "sequence_parallel": sequence_parallel}
    return run(hidden, *mine, target, upstream, **how)[1]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
def test_two_tensor_parallel_ranks(sequence_parallel: bool) -> None:
    """The hidden states' gradient is summed over the ranks, or each has its part of the sum."""
    ranks = run_ranks(2, on_rank, sequence_parallel, tensor_model_parallel_size=2)
    exactly = wanted(*inputs(torch.float64, 2 * VOCAB, device="cpu"))
    joined = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    if not sequence_parallel:
        exactly[0] = torch.cat([exactly[0]] * 2)
    assert error(joined, exactly) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared with the embedding"])
def test_main_grad_adds_up_in_fp32(
    dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Megatron's linear layers do with --gradient-accumulation-fusion."""
    # Operands in several parts, where they are widened first.
    monkeypatch.setattr("megatron_rw.kernels.products.WIDENED_ELEMENTS", 4096)
    hidden, weight, bias, target, upstream = inputs(dtype)
    parameter: Any = weight.clone().requires_grad_()
    parameter.main_grad = torch.ones(weight.shape, device=DEVICE)
    parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = False, shared
    for _ in range(3):
        how = {"bias": bias, "gradient_accumulation_fusion": True}
        call(hidden, parameter, target, **how).backward(upstream)
    assert parameter.grad_added_to_main_grad
    # Megatron's hooks want a gradient, of any values; to a shared one they add the embedding's.
    assert parameter.grad.shape == weight.shape
    assert not (shared and parameter.grad.any())
    _, exactly, _ = wanted(hidden, weight, bias, target, upstream)
    assert error([(parameter.main_grad.double() - 1) / 3], [exactly]) < BOUND[dtype]
    # Left alone unless asked.
    before, parameter.grad = parameter.main_grad.clone(), None
    call(hidden, parameter, target).backward(upstream)
    assert torch.equal(parameter.main_grad, before)
    assert parameter.grad.any()


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    *leaves, target, upstream = inputs()
    _, gradients = run(*leaves, target, upstream)
    for number, tensor in enumerate(leaves):
        tensor.requires_grad_(number != frozen)
    call(leaves[0], leaves[1], target, bias=leaves[2]).backward(upstream)
    for number, (tensor, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        assert (tensor.grad is None) == (number == frozen)
        assert tensor.grad is None or torch.equal(tensor.grad, gradient)


def test_second_backward_pass_is_the_first(name: Any) -> None:
    """Nothing that the backward pass needs is overwritten by it."""
    hidden, weight, _, target, upstream = inputs()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = call(hidden, weight, target, backend_name=name)
    first = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(losses, leaves, upstream)))


class PeakTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operators made and that are still alive, at the most.

    What an operator takes and gives back within itself is not seen, and `ignored` do not count.
    """

    def __init__(self, *ignored: Tensor) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = {x._cdata: (StorageWeakRef(x), x.nbytes()) for x in made}
        alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()} | new
        self._alive = {key: pair for key, pair in alive.items() if key not in self._ignored}
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self._alive.values()))
        return result


# The logits outweigh all else.
TOKENS, COLUMNS = 1024, 32768
LOGITS = TOKENS * COLUMNS * 2


def peak(loss: Callable[..., Tensor], backward: bool = True, **how: Any) -> int:
    """Of forward and backward in bf16, beyond hidden states, weight and their gradients."""
    hidden = torch.randn(TOKENS // 4, 4, HIDDEN).bfloat16().to(DEVICE).requires_grad_()
    weight = torch.randn(COLUMNS, HIDDEN).bfloat16().to(DEVICE).requires_grad_()
    target = torch.arange(TOKENS, device=DEVICE).view(-1, 4)
    with PeakTensors(hidden, weight) as memory:
        losses = loss(hidden, weight, target, **how)
        if not backward:
            return memory.bytes
        gradients = torch.autograd.grad(losses.sum(), [hidden, weight])
    return memory.bytes - sum(gradient.nbytes for gradient in gradients)


@pytest.mark.parametrize("share", [8, 3])
def test_splits_keep_the_budget(share: int) -> None:
    size = LOGITS // share
    assert size / 2 < peak(call, logits_budget=size, backend_name="torch") <= size
    with torch.no_grad():
        alone = peak(call, backward=False, logits_budget=size, backend_name="torch")
    assert size / 2 < alone <= size


def peak_on_rank() -> tuple[int, int]:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    # Hidden states outweigh the logits of a split, and pieces of a few rows.
    hidden = torch.randn(512, 4, 1024).bfloat16().requires_grad_()
    weight = torch.randn(2048, 1024).bfloat16().requires_grad_()
    target = torch.arange(4096).view(-1, 4)
    size = budget(hidden.expand(2, *hidden.shape).flatten(0, 1), 2048, 1024, gathers=True)
    how = {"tp_group": group, "sequence_parallel": True, "backend_name": "torch"}
    with PeakTensors(hidden, weight, target) as memory:
        losses = call(hidden, weight, target, logits_budget=size, **how)
        gradients = torch.autograd.grad(losses.sum(), [hidden, weight])
    return memory.bytes - sum(gradient.nbytes for gradient in gradients), size


def test_sequence_parallelism_keeps_the_budget() -> None:
    """The whole sequence's gradient, before it is scattered, is part of it."""
    for taken, size in run_ranks(2, peak_on_rank, tensor_model_parallel_size=2):
        assert size * 2 / 3 < taken <= size


def test_torch_backend_holds_no_copy_of_the_logits() -> None:
    """What it takes beside them are pieces of a few rows."""
    assert LOGITS <= peak(two_operations) <= LOGITS + (5 << 20)


tokens_columns_and_hidden = st.tuples(
    st.integers(1, 1 << 16), st.integers(1, 300_000), st.integers(1, 1 << 14)
)
a_dtype = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=200)
@given(tokens_columns_and_hidden, a_dtype, st.integers(1, 1 << 17), st.booleans())
def test_a_plan_covers_the_vocabulary_within_its_budget(
    sizes: tuple[int, int, int], dtype: torch.dtype, mib: int, gathers: bool
) -> None:
    try:
        plan = kernels.plan_logits(*sizes, dtype, mib << 20, gathers=gathers)
    except BudgetError as refusal:
        [least] = re.findall(r"([\d,]+) MiB is the least", str(refusal))
        mib, refused = int(least.replace(",", "")), mib
        assert mib > refused
        plan = kernels.plan_logits(*sizes, dtype, mib << 20, gathers=gathers)
    assert plan.nbytes <= mib << 20
    assert plan.columns * (plan.splits - 1) < sizes[1] <= plan.columns * plan.splits


def test_plan_says_what_it_does_and_refuses_too_little() -> None:
    plan = kernels.plan_logits(8192, 128256, 4096, torch.bfloat16, 213 << 20)
    assert str(plan) == "logits in 126 split(s) of at most 1024 columns, 213 MiB"
    hidden, weight, _, target, _ = inputs()
    with pytest.raises(BudgetError, match="is too small"):
        call(hidden, weight, target, logits_budget=1024)
