"""Both operations on one device in every backend against fp64, one named test for each pitfall."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rw import kernels
from megatron_rw.kernels import CrossEntropyOptions
from tests.kernels import BACKENDS, DEVICE
from tests.kernels.operations import (
    OPERATIONS,
    PLAIN,
    SHAPE,
    VARIANTS,
    call,
    close,
    compare,
    exact,
    inputs,
    run,
    run_on,
)

ALL = VARIANTS["all"]
HALF = [torch.bfloat16, torch.float16]
CASES = [(variant, torch.float32) for variant in VARIANTS]
CASES += [(variant, dtype) for variant in ("plain", "all") for dtype in HALF]


@pytest.mark.parametrize(("variant", "dtype"), CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_loss_and_gradient_are_those_of_fp64(
    variant: str, dtype: torch.dtype, operation: str, name: Any
) -> None:
    options = VARIANTS[variant]
    data = inputs(dtype, options=options)
    compare(run(*data, name, operation, options=options), *data, options=options)


ENTROPY = CrossEntropyOptions(entropy=True)
ONE_LABEL = (2, 3, 1)


@settings(max_examples=30)
@example(ONE_LABEL, 0, ENTROPY, "layer", "torch")
@example(ONE_LABEL, 0, ENTROPY, "in place", "cuda")
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)),
    st.integers(0, 99),
    st.sampled_from([PLAIN, ENTROPY]),
    st.sampled_from(OPERATIONS),
    st.sampled_from(BACKENDS),
)
def test_any_shape_even_of_one_label(
    shape: tuple[int, int, int], seed: int, options: CrossEntropyOptions, operation: str, name: Any
) -> None:
    data = inputs(shape=shape, seed=seed)
    compare(run(*data, name, operation, options=options), *data, options=options)


@pytest.mark.parametrize("kind", ["transposed", "cut", "expanded", "overlapping"])
def test_logits_of_any_strides(kind: str, name: Any) -> None:
    """Where elements share memory, the gradient cannot be written over them."""
    logits, target, upstream = inputs()
    view = {
        "transposed": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "cut": torch.cat([logits, logits], dim=2)[..., : SHAPE[2]],
        "expanded": logits[:, :1].expand(SHAPE),
        "overlapping": logits.view(-1).as_strided(SHAPE, (200, 60, 1)),
    }[kind]
    before = view.clone()
    compare(run_on(view, target, upstream, name, "in place"), before, target, upstream)
    assert torch.equal(view, before) == (kind in ("expanded", "overlapping"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("offset", [1, 3])
def test_rows_that_begin_anywhere(dtype: torch.dtype, offset: int, name: Any) -> None:
    """Odd rows in memory that is not aligned, read and written in vectors all the same."""
    logits, target, upstream = inputs(dtype, (2, 2, 531))
    values = logits.flatten()
    shifted = torch.cat([values[:offset], values])[offset:].view_as(logits)
    # Apart, the gradient is aligned otherwise than the logits.
    for operation in ("apart", "in place"):
        found = run_on(shifted, target, upstream, name, operation)
        compare(found, logits, target, upstream)


@pytest.mark.parametrize("kind", ["scalar", "per sample", "transposed"])
def test_upstream_of_any_strides(kind: str, operation: str, name: Any) -> None:
    logits, target, upstream = inputs()
    view = {
        "scalar": torch.tensor(0.7, device=DEVICE).expand(SHAPE[:2]),
        "per sample": upstream[:1].expand(SHAPE[:2]),
        "transposed": upstream.T.contiguous().T,
    }[kind]
    compare(run(logits, target, view, name, operation), logits, target, view)


def test_upstream_is_per_token_not_a_scalar(operation: str, name: Any) -> None:
    logits, target, upstream = inputs()
    target[0, 0], target[3, 2] = 1, 4
    # Peers that read it as a scalar read the first.
    upstream[0, 0], upstream[3, 2] = 0, 0.5
    changed = upstream.clone()
    changed[3, 2] = -1
    before, after = (run(logits, target, u, name, operation).gradient for u in (upstream, changed))
    assert not before[0, 0].any()
    assert before[3, 2].all()
    assert torch.equal(after[3, 2], -2 * before[3, 2])
    after[3, 2] = before[3, 2]
    assert torch.equal(after, before)


def test_half_precision_losses_are_not_rounded_to_it(operation: str, name: Any) -> None:
    losses = run(*inputs(torch.bfloat16), name, operation).losses
    assert (losses != losses.bfloat16().float()).any()


@pytest.mark.parametrize("reader", ["second backward pass", "another reader", "changed before"])
def test_whoever_needs_overwritten_logits_is_told(reader: str, name: Any) -> None:
    """The kernels write behind autograd's back, and bump the version counter themselves."""
    logits, target, _ = inputs()
    made = logits.requires_grad_() * 1.0
    square = made.square().sum()
    loss = call(made, target, name, "in place").losses.sum()
    if reader == "changed before":
        made.detach().mul_(2)
    else:
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square if reader == "another reader" else loss).backward()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("why", ["ignored", "zero upstream", "masked"])
def test_row_that_does_not_count_stores_literal_zeros(why: str, value: float, name: Any) -> None:
    """0·NaN is NaN, and a row of −inf has no softmax."""
    logits, target, upstream = inputs()
    logits[2, 1] = value
    target[2, 1] = PLAIN.ignore_index if why == "ignored" else 3
    upstream[2, 1] = math.nan if why == "ignored" else 0.0
    mask = torch.ones_like(upstream)
    mask[2, 1] = why == "ignored"
    found = run(logits, target, upstream, name, loss_mask=mask, of_sums=torch.ones_like(mask[0]))
    assert torch.isfinite(found.gradient).all()
    assert not found.gradient[2, 1].any()
    assert torch.isfinite(found.sums.loss_sum).all()  # type: ignore[union-attr]
    assert why != "ignored" or found.losses[2, 1] == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-4), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("own", [0.0, 14.0])
def test_probability_near_one(
    own: float, dtype: torch.dtype, tolerance: float, operation: str, name: Any
) -> None:
    """Of p − 1, about 10⁻³ here, digits are left: p itself is rounded to fp32 at the most."""
    gaps = torch.tensor([[12.0, 12.5, 13.0], [13.3, 13.7, 14.0]], device=DEVICE)
    logits, target, _ = inputs(shape=(2, 3, 1300))
    logits = (own - gaps.unsqueeze(-1) + logits / 8).to(dtype)
    target[:], logits[..., 7] = 7, own
    found = run(logits, target, gaps, name, operation)
    wanted = exact(logits, target, gaps)
    close(found.losses, wanted.losses)
    torch.testing.assert_close(found.gradient.double(), wanted.gradient, rtol=tolerance, atol=0)


def test_common_offset_costs_no_digits(operation: str, name: Any) -> None:
    logits, target, upstream = inputs()
    # Exact in fp32, whose spacing at 1000 is 6e-5.
    logits = (logits * 64).round() / 64
    found = run(logits + 1000, target, upstream, name, operation)
    wanted = exact(logits, target, upstream)
    close(found.losses, wanted.losses)
    torch.testing.assert_close(found.gradient.double(), wanted.gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("offset", [1e8, -1e9])
def test_row_that_is_far_from_zero(offset: float, operation: str, name: Any) -> None:
    """Where fp32 tells logits apart only in steps of 8 or 64, all are equal, or far apart."""
    logits, target, upstream = inputs()
    data = logits * 4 + offset, target, upstream
    compare(run(*data, name, operation), *data)


def test_infinite_loss_is_infinite_in_its_samples_sum(name: Any) -> None:
    """Where rounding is made up for, what an infinite sum lost is NaN."""
    logits, target, _ = inputs()
    logits[2, 1, 7], target[2, 1] = -math.inf, 7
    mask = torch.ones(target.shape, device=DEVICE)
    sums = call(logits, target, name, loss_mask=mask).sums
    assert sums is not None
    assert sums.loss_sum.isinf().tolist() == [False, True, False]


def test_all_tokens_ignored_or_masked(operation: str, name: Any) -> None:
    """As a rank of context parallelism may have it."""
    logits, target, upstream = inputs()
    # Of a sample without tokens, the mean and its gradient are 0/0.
    how = {"loss_mask": upstream * 0, "of_sums": torch.full((SHAPE[1],), math.nan, device=DEVICE)}
    masked = run(logits, target, upstream * 0, name, operation, **how)
    ignored = run(logits, target * 0 + PLAIN.ignore_index, upstream, name, operation)
    assert masked.sums is not None
    zeros = (*masked.sums, masked.gradient, ignored.losses, ignored.gradient)
    assert not any(tensor.any() for tensor in zeros)


def test_label_outside_the_vocabulary_is_not_a_number(operation: str, name: Any) -> None:
    logits, target, _ = inputs()
    target[0, 1], target[0, 2] = SHAPE[2], -1
    losses = call(logits, target, name, operation).losses
    assert torch.isnan(losses[0, 1:]).all()
    assert torch.isfinite(losses[1:]).all()


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_sums_of_the_samples_and_their_gradient(
    options: CrossEntropyOptions, operation: str, name: Any
) -> None:
    """Ignored labels are in no sum, whatever the mask."""
    logits, target, upstream = inputs(shape=(20, 3, 110), options=options)
    mask = (torch.arange(upstream.numel(), device=DEVICE).view_as(upstream) % 7 > 1).float()
    mask[:, 1] = 0
    counted = mask * (target != PLAIN.ignore_index)
    assert (counted != mask).any()
    weights = torch.tensor([0.3, -1.2, 2.0], device=DEVICE)
    how = {"options": options, "loss_mask": mask, "of_sums": weights}
    found = run(logits, target, upstream, name, operation, **how)
    compare(found, logits, target, mask * weights + upstream, options=options)
    assert found.sums is not None
    assert torch.equal(found.sums.tokens, counted.sum(dim=0))
    close(found.sums.loss_sum, (found.losses.double() * counted).sum(dim=0))
    assert not found.sums.tokens.requires_grad
    assert found.entropy is None or not found.entropy.requires_grad


def test_offsets_beyond_two_to_the_31(name: Any) -> None:
    far = 2**31 + 11
    # Untouched pages of it cost no memory.
    storage = torch.empty(far + 64, dtype=torch.bfloat16, device=DEVICE)
    data = inputs(torch.bfloat16, (2, 1, 64))
    logits = storage.as_strided((2, 1, 64), (far, 64, 1)).copy_(data[0])
    data[1][:], data[2][:] = 9, 0.5
    compare(run_on(logits, *data[1:], name, "in place"), *data)


def test_results_repeat_bit_for_bit(operation: str, name: Any) -> None:
    data = inputs(torch.bfloat16, options=ALL)
    first, second = (run(*data, name, operation, options=ALL) for _ in range(2))
    for one, other in zip(first[:3], second[:3], strict=True):
        assert one is not None and other is not None  # noqa: PT018
        assert torch.equal(one, other)


OTHER_DTYPES = [
    (torch.int32, torch.bool),
    (torch.int16, torch.int64),
    (torch.uint8, torch.float64),
    (torch.int64, torch.bfloat16),
]


@pytest.mark.parametrize(("labels", "masks"), OTHER_DTYPES)
def test_labels_and_masks_of_other_dtypes(
    labels: torch.dtype, masks: torch.dtype, operation: str, name: Any
) -> None:
    logits, target, upstream = inputs()
    mask = target % 4 > 0
    target.clamp_(min=0)
    found, wanted = (
        run(logits, y, upstream, name, operation, loss_mask=m, of_sums=upstream[0])
        for y, m in ((target.to(labels), mask.to(masks)), (target, mask.float()))
    )
    assert torch.equal(found.gradient, wanted.gradient)
    assert all(map(torch.equal, found.sums or (), wanted.sums or ()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype, name: Any) -> None:
    """The fused layer's operands are cast as a linear layer's are: test_linear_layer.py."""
    data = inputs(dtype, options=ALL)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(*data, name, options=ALL)
    compare(found, *data, options=ALL)


def test_gradient_of_the_gradient_is_refused(operation: str, name: Any) -> None:
    logits, target, _ = inputs()
    leaf = logits.requires_grad_()
    losses = call(leaf.view_as(leaf), target, name, operation).losses
    [gradient] = torch.autograd.grad(losses.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiled_code_breaks_its_graph_around_it(name: Any) -> None:
    logits, target, _ = inputs()
    leaf, identity = logits.requires_grad_(), torch.eye(SHAPE[2], device=DEVICE)
    how = kernels.Weighting(strategy="linupper", temperature=0.4)
    loss, layer, weigh = (
        functools.partial(function, backend_name=name)
        for function in (
            kernels.vocab_parallel_cross_entropy,
            kernels.linear_weighted_cross_entropy,
            kernels.weigh_units,
        )
    )
    for function in (
        lambda x: loss(x / 2, target).losses * 2,
        lambda x: layer(x / 2, identity, target, logits_budget=1 << 30).losses * 2,
        lambda x: weigh(kernels.Units(x[0, 0] / 2), how).weights * x[0, 0],
    ):
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable"):
            torch.compile(function, backend="aot_eager", fullgraph=True)(leaf)
        torch.compiler.reset()
        found, wanted = torch.compile(function, backend="aot_eager")(leaf), function(leaf)
        close(found, wanted)
        gradients = [torch.autograd.grad(x.square().sum(), leaf)[0] for x in (found, wanted)]
        torch.testing.assert_close(*gradients)
