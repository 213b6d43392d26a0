"""The fused output layer as part of a model: memory, main_grad, shared weights, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.memory import PeakTensors
from megatron_rw.kernels import (
    BudgetError,
    CrossEntropyOptions,
    linear_weighted_cross_entropy,
    linear_weighted_cross_entropy_sums,
    plan_logits,
    vocab_parallel_cross_entropy,
)
from megatron_rw.kernels.logits_plan import FEWEST_COLUMNS, least_budget, plan_losses
from megatron_rw.kernels.products import add_product
from tests.kernels import reference
from tests.kernels.test_linear_cross_entropy import DEVICE, PLAIN, budget, error, inputs, run

# The logits outweigh all else.
TOKENS, HIDDEN, VOCAB = 4096, 64, 32768
LOGITS = TOKENS * VOCAB * 2


def peak(loss: Callable[[Tensor, Tensor, Tensor], Tensor], backward: bool = True) -> int:
    """Of forward and backward in bf16, beyond hidden states, weight and their gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS // 4, 4, HIDDEN, generator=generator).bfloat16().to(DEVICE)
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.2).bfloat16().to(DEVICE)
    target = torch.randint(0, VOCAB, (TOKENS // 4, 4), generator=generator).to(DEVICE)
    upstream = torch.rand(target.shape, generator=generator).to(DEVICE)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    with PeakTensors(hidden, weight) as memory:
        losses = loss(hidden, weight, target)
        if not backward:
            return memory.bytes
        gradients = torch.autograd.grad(losses, leaves, upstream.to(losses.dtype))
    return memory.bytes - sum(gradient.nbytes for gradient in gradients)


def fused(logits_budget: int | None) -> Callable[..., Tensor]:
    return lambda *given: linear_weighted_cross_entropy(*given, logits_budget=logits_budget)


def test_kept_logits_are_one_buffer() -> None:
    assert peak(fused(None)) <= 1.05 * LOGITS


@pytest.mark.parametrize("share", [16, 5, 2])
def test_splits_keep_the_budget(share: int) -> None:
    assert LOGITS / share / 2 < peak(fused(LOGITS // share)) <= LOGITS / share


def test_apart_takes_more() -> None:
    """The counter counts: our own loss behind a linear layer holds logits, core's more."""
    apart = peak(lambda x, w, t: vocab_parallel_cross_entropy(x @ w.T, t, backend_name="torch"))
    assert LOGITS <= apart <= 1.05 * LOGITS

    def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float().flatten(0, 1)
        return functional.cross_entropy(logits, target.flatten(), reduction="none").view_as(target)

    assert peak(eager) >= 4 * LOGITS


def test_losses_alone_never_hold_all_logits() -> None:
    with torch.no_grad():
        assert peak(fused(None), backward=False) < 0.6 * LOGITS
        # The torch backend's copies of a few rows come on top.
        assert peak(fused(LOGITS // 16), backward=False) < LOGITS // 16 + (6 << 20)


@settings(max_examples=200)
@given(
    tokens=st.integers(1, 1 << 16),
    columns=st.integers(1, 300_000),
    hidden_size=st.integers(1, 1 << 14),
    mib=st.integers(1, 1 << 17),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gathers=st.booleans(),
)
def test_a_plan_covers_the_vocabulary_within_its_budget(
    tokens: int, columns: int, hidden_size: int, mib: int, dtype: torch.dtype, gathers: bool
) -> None:
    try:
        plan = plan_logits(tokens, columns, hidden_size, dtype, mib << 20, gathers=gathers)
    except BudgetError:
        # Even so few columns are too many.
        assert least_budget(tokens, columns, hidden_size, dtype, gathers=gathers) > mib << 20
        return
    assert plan.nbytes <= mib << 20
    assert plan.columns * (plan.splits - 1) < columns <= plan.columns * plan.splits
    assert plan.splits == 1 or not plan.keep
    losses = plan_losses(tokens, columns, dtype, mib << 20)
    assert losses.columns * (losses.splits - 1) < columns <= losses.columns * losses.splits


def test_without_a_budget_logits_are_kept() -> None:
    assert plan_logits(1 << 20, 1 << 18, 1 << 13, torch.bfloat16).keep


def test_budget_that_is_too_small_says_what_is_enough() -> None:
    hidden, weight, _, target, _ = inputs()
    needed = "100 MiB for logits is too small for 8192 tokens of 4096 hidden units: 213 MiB"
    with pytest.raises(BudgetError, match=needed):
        plan_logits(8192, 128256, 4096, torch.bfloat16, 100 << 20)
    with pytest.raises(BudgetError):
        linear_weighted_cross_entropy(
            hidden.requires_grad_(), weight, target, logits_budget=FEWEST_COLUMNS
        )
    plan = plan_logits(8192, 128256, 4096, torch.bfloat16, 213 << 20)
    assert not plan.keep
    assert str(plan) == "computes logits twice, in 126 splits of at most 1024 columns, 213 MiB"
    kept = plan_logits(8192, 128256, 4096, torch.bfloat16)
    assert str(kept) == "keeps 128256 columns of logits from forward to backward, 2,073 MiB"


@pytest.mark.parametrize("mode", ["keep", "split"])
def test_main_grad_adds_up_in_fp32(mode: str) -> None:
    """What Megatron's linear layers do with --gradient-accumulation-fusion."""
    hidden, weight, _, target, upstream = inputs(torch.bfloat16)
    _, (_, wanted) = reference.linear(hidden, weight, None, target, upstream, PLAIN)
    weight.requires_grad_()
    weight.main_grad = torch.ones(weight.shape, device=DEVICE)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(3):
        losses = linear_weighted_cross_entropy(
            hidden,
            weight,
            target,
            gradient_accumulation_fusion=True,
            logits_budget=budget(mode, hidden),
        )
        losses.backward(upstream)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    # Megatron's hooks want a gradient, of any values.
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape
    assert error((weight.main_grad.double() - 1) / 3, wanted) < 1e-2  # type: ignore[attr-defined]


def test_main_grad_of_a_weight_that_an_embedding_shares() -> None:
    """Megatron reads the gradient as well, where the embedding's is: ours there must be 0."""
    hidden, weight, _, target, upstream = inputs()
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    losses = linear_weighted_cross_entropy(
        hidden, weight, target, gradient_accumulation_fusion=True
    )
    (losses * upstream).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()
    assert weight.main_grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_main_grad_is_left_alone_unless_asked() -> None:
    hidden, weight, _, target, upstream = inputs()
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    linear_weighted_cross_entropy(hidden, weight, target).backward(upstream)
    assert (weight.main_grad == 0).all()  # type: ignore[attr-defined]
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["keep", "split"])
def test_weight_shared_with_the_embedding(mode: str) -> None:
    _, weight, _, target, upstream = inputs(torch.float64)
    tokens = torch.randint(0, len(weight), target.shape, device=DEVICE)

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = weight.clone().requires_grad_()
        losses = loss(functional.embedding(tokens, leaf).tanh(), leaf)
        [found] = torch.autograd.grad(losses, leaf, upstream.double())
        return found

    found = gradient(
        lambda x, w: linear_weighted_cross_entropy(x, w, target, logits_budget=budget(mode, x))
    )
    wanted = gradient(lambda x, w: reference.cross_entropy(x @ w.T, target, PLAIN))
    assert error(found, wanted) < 1e-12


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("mode", ["keep", "split"])
def test_what_needs_no_gradient_gets_none(frozen: str, mode: str) -> None:
    hidden, weight, bias, target, upstream = inputs()
    _, wanted = run(*(hidden, weight, bias, target, upstream), logits_budget=budget(mode, hidden))
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in leaves.items():
        tensor.requires_grad_(name != frozen)
    losses = linear_weighted_cross_entropy(
        hidden, weight, target, bias=bias, logits_budget=budget(mode, hidden)
    )
    losses.backward(upstream)
    for tensor, gradient in zip(leaves.values(), wanted, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("mode", ["keep", "split"])
def test_second_backward_pass_is_the_first(mode: str) -> None:
    """Nothing that the backward pass needs is overwritten by it."""
    hidden, weight, _, target, upstream = inputs()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = linear_weighted_cross_entropy(
        hidden, weight, target, logits_budget=budget(mode, hidden)
    )
    first = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(losses, leaves, upstream)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gradient_of_the_gradient_raises() -> None:
    hidden, weight, _, target, _ = inputs()
    losses = linear_weighted_cross_entropy(hidden.requires_grad_(), weight, target)
    [gradient] = torch.autograd.grad(losses.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiled_code_breaks_round_it() -> None:
    hidden, weight, _, target, upstream = inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return (linear_weighted_cross_entropy(hidden * 2, weight, target) * upstream).sum()

    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    torch.compiler.reset()
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*leaves), leaves)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_product_in_more_bits_than_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rw.kernels.products.WIDENED_ELEMENTS", 100)
    left, right = (torch.randn(*shape).bfloat16().to(DEVICE) for shape in ((37, 50), (50, 11)))
    into = torch.randn(37, 11, device=DEVICE)
    wanted = into.double() + left.double() @ right.double()
    add_product(into, left.T.contiguous().T, right)
    torch.testing.assert_close(into.double(), wanted, rtol=1e-5, atol=1e-5)


def refused(**changes: Any) -> str:
    hidden, weight, bias, target, _ = inputs()
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        linear_weighted_cross_entropy(**(given | changes))
    return str(refusal.value)


def test_wrong_inputs_are_refused() -> None:
    hidden, weight, bias, target, _ = inputs()
    assert "hidden must be [s, b, h]" in refused(target=target.T)
    assert "weight must be [v, h] with the 24 hidden units" in refused(weight=weight.T)
    assert "bias must be [v], 1300 values" in refused(bias=bias[1:])
    assert "weight is torch.bfloat16 and hidden torch.float32" in refused(weight=weight.bfloat16())
    assert "a quantised output layer has its own products" in refused(
        weight=weight.to(torch.float8_e4m3fn)
    )
    assert "has no elements" in refused(hidden=hidden[:0], target=target[:0])
    assert "vocab_size 1301 does not fit" in refused(options=CrossEntropyOptions(vocab_size=1301))
    assert "no label smoothing: use vocab_parallel_cross_entropy" in refused(
        options=CrossEntropyOptions(label_smoothing=0.1)
    )
    assert "the backend triton has no float64: use torch" in refused(
        hidden=hidden.double(), weight=weight.double(), bias=None, backend_name="triton"
    )
    with pytest.raises(ValueError, match=r"loss_mask must be \[s, b\]"):
        linear_weighted_cross_entropy_sums(hidden, weight, target, target.T)
