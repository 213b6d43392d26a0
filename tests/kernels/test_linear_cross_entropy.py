"""The fused output layer in every backend and both modes against fp64.

Hidden states, weights and upstream gradients are random; upstream is signed, other for every token
and 0 for some, as sample weights make it. Errors are relative, of whole gradients in the Euclidean
norm: rounded operands, and so errors of single elements, are of the size of the largest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rw.kernels import (
    CrossEntropyOptions,
    linear_weighted_cross_entropy,
    linear_weighted_cross_entropy_sums,
    vocab_parallel_cross_entropy,
)
from megatron_rw.kernels.logits_plan import least_budget
from megatron_rw.kernels.options import Shard
from megatron_rw.kernels.passes import backend, join
from megatron_rw.kernels.probabilities import probability_backend
from tests.kernels import reference
from tests.ranks import run_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Any] = ["torch", "triton", "cuda"]
SHAPE, HIDDEN, VOCAB = (6, 3), 24, 1300
PLAIN = CrossEntropyOptions()
VARIANTS = {
    "plain": PLAIN,
    "z-loss": CrossEntropyOptions(z_loss=1e-2),
    "soft-cap": CrossEntropyOptions(softcap=3.0),
    "padded": CrossEntropyOptions(vocab_size=1101),
    "all": CrossEntropyOptions(z_loss=1e-2, softcap=5.0, vocab_size=1101),
}
# Of losses and of gradients: what rounding logits, probabilities and results to the dtype makes.
BOUND = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (4e-3, 1e-2),
    torch.float16: (5e-4, 2e-3),
}
# fp64 is the torch backend's.
PRECISIONS = [
    (dtype, name) for dtype in BOUND for name in BACKENDS if name == "torch" or dtype.itemsize < 8
]
MODES = ["keep", "split"]


def bound(dtype: torch.dtype, name: Any) -> tuple[float, float]:
    """Of `BOUND`; Triton's interpreter cuts bits off to bf16 instead of rounding."""
    of_losses, of_gradients = BOUND[dtype]
    cuts = name == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16
    return of_losses, of_gradients * (2 if cuts else 1)


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inputs(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int] = SHAPE,
    vocab_size: int | None = None,
    seed: int = 0,
    device: str = DEVICE,
    width: int = VOCAB,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, labels with some ignored, upstream gradients with some 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(width, HIDDEN, generator=generator) * 0.5).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype)
    target = torch.randint(0, vocab_size or width, shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    target.view(-1)[3::5] = PLAIN.ignore_index
    upstream.view(-1)[1::7] = 0
    upstream.view(-1)[0] = 0
    return tuple(tensor.to(device) for tensor in (hidden, weight, bias, target, upstream))  # type: ignore[return-value]


def budget(mode: str, hidden: Tensor, width: int = VOCAB, gathers: bool = False) -> int | None:
    """Bytes that have the vocabulary cut at 1024 columns and its rest, or none."""
    if mode == "keep":
        return None
    sequence, batch, size = hidden.shape
    return least_budget(sequence * batch, width, size, hidden.dtype, gathers=gathers)


def error(found: Tensor, wanted: Tensor, least: float = 1e-300) -> float:
    """Relative, infinite where it is not a number.

    Args:
        found: of any dtype.
        wanted: fp64.
        least: what the error is relative to where `wanted` is smaller.
    """
    value = float((found.double() - wanted).norm() / wanted.norm().clamp(min=least))
    return value if math.isfinite(value) else math.inf


def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    **how: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Losses, and gradients of hidden states, weight and bias."""
    given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    losses = linear_weighted_cross_entropy(
        leaves[0], leaves[1], target, bias=leaves[2] if bias is not None else None, **how
    )
    return losses.detach(), list(torch.autograd.grad(losses, leaves, upstream.to(losses.dtype)))


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    options: CrossEntropyOptions = PLAIN,
    **how: Any,
) -> None:
    """Losses and gradients are the reference's."""
    wanted, gradients = reference.linear(hidden, weight, bias, target, upstream, options)
    losses, found = run(hidden, weight, bias, target, upstream, options=options, **how)
    of_losses, of_gradients = bound(hidden.dtype, how["backend_name"])
    assert losses.dtype == torch.promote_types(hidden.dtype, torch.float32)
    # The logits' rounding shows in the small loss, and gradient, of a token that is nearly sure.
    assert error(losses, wanted, 1.0) < of_losses
    for mine, theirs in zip(found, gradients, strict=True):
        assert mine.dtype == hidden.dtype
        assert error(mine, theirs, float(upstream.norm())) < of_gradients


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "name"), PRECISIONS)
def test_loss_and_gradients_are_those_of_fp64(
    variant: str, dtype: torch.dtype, mode: str, name: Any
) -> None:
    options = VARIANTS[variant]
    hidden, weight, bias, target, upstream = inputs(dtype, vocab_size=options.vocab_size)
    how = {"logits_budget": budget(mode, hidden), "backend_name": name}
    check(hidden, weight, None, target, upstream, options, **how)
    if name == "torch":
        check(hidden, weight, bias, target, upstream, options, **how)


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 1400),
    st.integers(0, 99),
    st.sampled_from(BACKENDS),
    st.sampled_from(MODES),
)
def test_any_shape(sequence: int, batch: int, width: int, seed: int, name: Any, mode: str) -> None:
    hidden, weight, _, target, upstream = inputs(shape=(sequence, batch), seed=seed, width=width)
    upstream.view(-1)[0] = 1  # or there may be no gradient at all
    target.view(-1)[0] = 0
    how = {"logits_budget": budget(mode, hidden, width), "backend_name": name}
    check(hidden, weight, None, target, upstream, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_longer_than_registers_hold(dtype: torch.dtype, name: Any) -> None:
    """What a block of 64 emulated threads keeps is 1024 or 2048 columns."""
    hidden, weight, _, target, upstream = inputs(dtype, shape=(2, 2), width=8192 + 37)
    check(hidden, weight, None, target, upstream, backend_name=name)


@pytest.mark.parametrize("name", ["torch"] if DEVICE == "cpu" else BACKENDS)
def test_no_less_exact_than_the_layer_and_its_loss_apart(mode: str, name: Any) -> None:
    """In bf16, where both round; apart, the gradient of the logits is rounded instead."""
    hidden, weight, _, target, upstream = inputs(torch.bfloat16, shape=(64, 4), width=4000)
    _, wanted = reference.linear(hidden, weight, None, target, upstream, PLAIN)
    _, found = run(
        *(hidden, weight, None, target, upstream),
        logits_budget=budget(mode, hidden),
        backend_name=name,
    )
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    apart = vocab_parallel_cross_entropy(leaves[0] @ leaves[1].T, target, backend_name="torch")
    for mine, theirs, exact in zip(
        found, torch.autograd.grad(apart, leaves, upstream), wanted, strict=True
    ):
        assert error(mine, exact) < 1.1 * error(theirs, exact)


def test_upstream_is_per_token_not_a_scalar(mode: str, name: Any) -> None:
    hidden, weight, _, target, upstream = inputs()
    target[0, 1], target[3, 2], upstream[3, 2] = 1, 4, 0.5
    changed = upstream.clone()
    changed[3, 2] = -1
    how = {"logits_budget": budget(mode, hidden), "backend_name": name}
    _, (before, _) = run(hidden, weight, None, target, upstream, **how)
    _, (after, _) = run(hidden, weight, None, target, changed, **how)
    assert (before[0, 0] == 0).all()
    assert torch.equal(after[3, 2], -2 * before[3, 2])
    after[3, 2] = before[3, 2]
    assert torch.equal(after, before)


@pytest.mark.parametrize("why", ["ignored", "zero upstream"])
def test_nan_in_a_token_that_does_not_count_stays_there(why: str, mode: str, name: Any) -> None:
    """Not even in the weight's gradient, a product over all tokens, is 0·NaN."""
    hidden, weight, _, target, upstream = inputs()
    target[2, 1], upstream[2, 1] = 3, 0.0
    how = {"logits_budget": budget(mode, hidden), "backend_name": name}
    _, wanted = run(hidden, weight, None, target, upstream, **how)
    hidden[2, 1] = math.nan
    if why == "ignored":
        target[2, 1], upstream[2, 1] = PLAIN.ignore_index, math.nan
    losses, found = run(hidden, weight, None, target, upstream, **how)
    assert (found[0][2, 1] == 0).all()
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert why != "ignored" or losses[2, 1] == 0


def test_nan_that_counts_is_not_hidden(mode: str, name: Any) -> None:
    hidden, weight, _, target, upstream = inputs()
    hidden[2, 1, 0] = math.inf
    target[2, 1], upstream[2, 1] = 3, 0.5
    losses, (of_hidden, of_weight) = run(
        *(hidden, weight, None, target, upstream),
        logits_budget=budget(mode, hidden),
        backend_name=name,
    )
    assert not torch.isfinite(losses[2, 1])
    assert torch.isnan(of_hidden[2, 1]).any()
    assert torch.isnan(of_weight).any()


def with_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and weight that have exactly these logits, `[s, b, v]`."""
    sequence, batch, width = logits.shape
    hidden = torch.eye(sequence * batch, dtype=logits.dtype, device=logits.device)
    weight = logits.view(sequence * batch, width).T.contiguous()
    return hidden.view(sequence, batch, -1), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype: torch.dtype, name: Any) -> None:
    """±80: one token sure of its target, one sure of another, one of several, one of none."""
    logits = torch.full((2, 3, 70), -80.0, dtype=dtype, device=DEVICE)
    target = torch.full((2, 3), 5, device=DEVICE)
    logits[0, 0, 5] = logits[0, 1, 9] = 80
    logits[0, 2, :40] = 80
    logits[1, 0] = -80
    logits[1, 1, 5], logits[1, 2, 5] = 30, -math.inf
    logits[1, 2, :5] = 0
    upstream = torch.tensor([[1.0, -2.0, 0.5], [0.7, 3.0, 0.0]], device=DEVICE)
    # −inf as a product would be −inf·0: it comes by the bias, as padding does by its columns.
    hidden, weight = with_logits(logits.clamp(min=-80))
    bias = torch.zeros(70, dtype=dtype, device=DEVICE)
    bias[60:] = -math.inf
    options = CrossEntropyOptions(z_loss=1e-4)
    wanted, gradients = reference.linear(hidden, weight, bias, target, upstream, options)
    losses, found = run(hidden, weight, bias, target, upstream, options=options, backend_name=name)
    # The reference's own −inf·0 in the bias's gradient.
    assert error(losses, wanted) < BOUND[dtype][0]
    for mine, theirs in zip(found[:2], gradients[:2], strict=True):
        assert error(mine, theirs) < BOUND[dtype][1]
    assert torch.isfinite(found[2]).all()


def emulated(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    upstream: Tensor,
    shards: int,
    options: CrossEntropyOptions,
    name: Any,
) -> tuple[Tensor, list[Tensor]]:
    """What `shards` tensor-parallel ranks would compute together, in this process."""
    passes, rows = backend(name), probability_backend(name)
    width = len(weight) // shards
    vocab_size = options.vocab_size or len(weight)
    parts = [
        Shard(rank * width, min(width, vocab_size - rank * width), vocab_size)
        for rank in range(shards)
    ]
    weights = weight.split(width)
    kept = [hidden @ part.T for part in weights]
    tables = [
        rows.probabilities(q, target, shard, options) for q, shard in zip(kept, parts, strict=True)
    ]
    losses, lse, _ = join(torch.cat(tables), target, None, None, parts[0], options, passes)
    of_hidden, of_weight = torch.zeros_like(hidden), []
    for q, table, shard, part in zip(kept, tables, parts, weights, strict=True):
        scale = rows.subtract_targets(q, table, target, lse, shard, options)
        factor = torch.where(scale == 0, 0.0, upstream * scale).to(hidden.dtype).unsqueeze(-1)
        of_hidden += factor * (q @ part)
        of_weight.append(q.flatten(0, 1).T @ (factor * hidden).flatten(0, 1))
    return losses, [of_hidden, torch.cat(of_weight)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_together_are_the_whole(variant: str, shards: int, name: Any) -> None:
    options = VARIANTS[variant]
    hidden, weight, _, target, upstream = inputs(vocab_size=options.vocab_size)
    wanted, gradients = reference.linear(hidden, weight, None, target, upstream, options)
    losses, found = emulated(hidden, weight, target, upstream, shards, options, name)
    assert error(losses, wanted) < 1e-6
    for mine, theirs in zip(found, gradients, strict=True):
        assert error(mine, theirs) < 2e-6


GAPS = {
    torch.float64: (20.0, 690.0, 710.0, 3000.0),
    torch.float32: (20.0, 78.0, 82.0, 100.0, 3000.0),
    torch.bfloat16: (20.0, 78.0, 82.0, 100.0, 3000.0),
    torch.float16: (5.0, 7.0, 9.0, 13.0, 100.0, 3000.0),
}


@pytest.mark.parametrize(("dtype", "name"), PRECISIONS)
def test_target_in_a_shard_without_probability(dtype: torch.dtype, name: Any) -> None:
    """lse beyond the shard's own by so much that exp of it overflows, or nearly does."""
    generator = torch.Generator().manual_seed(0)
    for gap in GAPS[dtype]:
        logits = torch.randn(4, 2, 40, generator=generator)
        logits[..., 20:] -= gap
        logits = logits.to(dtype).to(DEVICE)
        hidden, weight = with_logits(logits)
        target = torch.tensor([[3, 25], [39, 20], [30, 0], [19, 22]], device=DEVICE)
        upstream = torch.linspace(-1.5, 2, 8, device=DEVICE).view(4, 2)
        wanted, gradients = reference.linear(hidden, weight, None, target, upstream, PLAIN)
        losses, found = emulated(hidden, weight, target, upstream, 2, PLAIN, name)
        assert error(losses, wanted) < BOUND[dtype][0], gap
        for mine, theirs in zip(found, gradients, strict=True):
            assert torch.isfinite(mine).all(), gap
            assert error(mine, theirs) < BOUND[dtype][1], gap


def test_shard_of_minus_infinity_joins_the_others(name: Any) -> None:
    logits = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[..., 20:] = -math.inf
    target = torch.tensor([[3, 25], [19, 39]], device=DEVICE)
    passes, rows = backend(name), probability_backend(name)
    parts = [Shard(0, 20, 40), Shard(20, 20, 40)]
    kept = [part.contiguous() for part in logits.chunk(2, dim=2)]
    tables = [
        rows.probabilities(q, target, shard, PLAIN) for q, shard in zip(kept, parts, strict=True)
    ]
    losses, lse, _ = join(torch.cat(tables), target, None, None, parts[0], PLAIN, passes)
    assert torch.equal(torch.isinf(losses), target >= 20)
    gradients = []
    for q, table, shard in zip(kept, tables, parts, strict=True):
        scale = rows.subtract_targets(q, table, target, lse, shard, PLAIN)
        gradients.append(scale.unsqueeze(-1) * q)
    hot = torch.nn.functional.one_hot(target, 40)
    torch.testing.assert_close(torch.cat(gradients, dim=2), torch.softmax(logits, dim=2) - hot)


def test_probability_near_one(mode: str, name: Any) -> None:
    """Small as 1 − p is, it is not what is left of two rounded numbers."""
    logits = torch.zeros(2, 2, 1100, dtype=torch.bfloat16, device=DEVICE)
    logits[..., 7] = torch.tensor([[8.0, 10.0], [12.0, 14.0]], device=DEVICE)
    hidden, weight = with_logits(logits)
    target = torch.full((2, 2), 7, device=DEVICE)
    upstream = torch.tensor([[1.0, -2.0], [0.5, 1.5]], device=DEVICE)
    _, wanted = reference.linear(hidden, weight, None, target, upstream, PLAIN)
    _, found = run(
        *(hidden, weight, None, target, upstream),
        logits_budget=budget(mode, hidden),
        backend_name=name,
    )
    # Row by row: each is of another size.
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-2, atol=0)


def test_all_tokens_ignored(mode: str, name: Any) -> None:
    hidden, weight, _, target, upstream = inputs()
    target[:] = PLAIN.ignore_index
    how = {"logits_budget": budget(mode, hidden), "backend_name": name}
    losses, found = run(hidden, weight, None, target, upstream, **how)
    assert (losses == 0).all()
    assert all((gradient == 0).all() for gradient in found)


def test_label_outside_the_vocabulary_is_not_a_number(mode: str, name: Any) -> None:
    hidden, weight, _, target, _ = inputs()
    target[0, 1], target[0, 2] = VOCAB, -1
    losses = linear_weighted_cross_entropy(
        hidden, weight, target, logits_budget=budget(mode, hidden), backend_name=name
    )
    assert torch.isnan(losses[0, 1:]).all()
    assert torch.isfinite(losses[1:]).all()


def test_sums_of_the_samples_and_their_gradient(mode: str, name: Any) -> None:
    hidden, weight, _, target, _ = inputs()
    mask = (torch.arange(18).view(SHAPE) % 4 > 0).float().to(DEVICE)
    mask[:, 1] = 0
    weights = torch.tensor([0.3, -1.2, 2.0], device=DEVICE)
    both = torch.rand_like(mask)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    losses, sums = linear_weighted_cross_entropy_sums(
        *(leaves[0], leaves[1], target, mask),
        logits_budget=budget(mode, hidden),
        backend_name=name,
    )
    found = torch.autograd.grad((sums.loss_sum * weights).sum() + (losses * both).sum(), leaves)
    upstream = mask * weights + both
    wanted, gradients = reference.linear(hidden, weight, None, target, upstream, PLAIN)
    assert torch.equal(sums.tokens, mask.sum(dim=0))
    torch.testing.assert_close(sums.loss_sum.detach().double(), (wanted * mask).sum(dim=0))
    for mine, theirs in zip(found, gradients, strict=True):
        assert error(mine, theirs) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_for_bit(dtype: torch.dtype, mode: str, name: Any) -> None:
    hidden, weight, _, target, upstream = inputs(dtype)
    how = {"logits_budget": budget(mode, hidden), "backend_name": name}
    first, second = (run(hidden, weight, None, target, upstream, **how) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


def of_two_ranks(
    options: CrossEntropyOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each rank's half of the vocabulary can be split. They talk over gloo, on any machine."""
    vocab_size = options.vocab_size and options.vocab_size + VOCAB
    return inputs(torch.float64, vocab_size=vocab_size, device="cpu", width=2 * VOCAB)


def on_rank(variant: str, mode: str, sequence_parallel: bool) -> tuple[Tensor, list[Tensor]]:
    from megatron.core import parallel_state

    hidden, weight, bias, target, upstream = of_two_ranks(VARIANTS[variant])
    group = parallel_state.get_tensor_model_parallel_group()
    weight, bias = (part.chunk(2)[group.rank()] for part in (weight, bias))
    size = budget(mode, hidden, gathers=sequence_parallel)
    if sequence_parallel:
        hidden = hidden.chunk(2)[group.rank()]
    return run(
        *(hidden, weight, bias, target, upstream),
        tp_group=group,
        options=padded_for_two(VARIANTS[variant]),
        sequence_parallel=sequence_parallel,
        logits_budget=size,
    )


def padded_for_two(options: CrossEntropyOptions) -> CrossEntropyOptions:
    """With as much padding behind two shards as behind one."""
    if options.vocab_size is None:
        return options
    return dataclasses.replace(options, vocab_size=options.vocab_size + VOCAB)


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
def test_two_tensor_parallel_ranks(variant: str, mode: str, sequence_parallel: bool) -> None:
    ranks = run_ranks(2, on_rank, variant, mode, sequence_parallel, tensor_model_parallel_size=2)
    options = padded_for_two(VARIANTS[variant])
    wanted, (of_hidden, *others) = reference.linear(*of_two_ranks(VARIANTS[variant]), options)
    for losses, _ in ranks:
        assert error(losses, wanted) < 1e-12
    hidden = [found[0] for _, found in ranks]
    if sequence_parallel:
        assert error(torch.cat(hidden), of_hidden) < 1e-12
    else:
        assert all(error(part, of_hidden) < 1e-12 for part in hidden)
    for number, theirs in enumerate(others, start=1):
        assert error(torch.cat([found[number] for _, found in ranks]), theirs) < 1e-12
