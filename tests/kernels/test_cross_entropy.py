"""Every backend of `vocab_parallel_cross_entropy` against fp64, one named test for each pitfall.

Where there is no GPU, Triton's kernels run under its interpreter and the CUDA kernels emulated.
Upstream gradients are random, signed and different for every token, as sample weights make them.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rw.kernels import (
    CrossEntropyOptions,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_sums,
)
from megatron_rw.kernels.cuda_backend import CudaBackend, CudaLaunch
from megatron_rw.kernels.options import CrossEntropyBackend, Shard
from megatron_rw.kernels.passes import backend
from megatron_rw.kernels.selection import check_backend, default_backend, use_backend
from megatron_rw.kernels.triton_backend import Launch, TritonBackend
from tests.kernels import reference
from tests.ranks import run_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Any] = ["torch", "triton", "cuda"]
SHAPE = (6, 3, 130)
PLAIN = CrossEntropyOptions()
VARIANTS = {
    "plain": PLAIN,
    "z-loss": CrossEntropyOptions(z_loss=1e-2),
    "label smoothing": CrossEntropyOptions(label_smoothing=0.2),
    "soft-cap": CrossEntropyOptions(softcap=3.0),
    "padded": CrossEntropyOptions(vocab_size=101),
    "all": CrossEntropyOptions(z_loss=1e-2, label_smoothing=0.1, softcap=5.0, vocab_size=101),
}
# Rounding of the gradient to the logits' dtype, and of the losses to fp32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


def inputs(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = SHAPE,
    vocab_size: int | None = None,
    seed: int = 0,
    device: str = DEVICE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with some ignored, upstream gradients with some 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * 4).to(dtype)
    target = torch.randint(0, vocab_size or shape[2], shape[:2], generator=generator)
    upstream = torch.randn(shape[:2], generator=generator)
    target.view(-1)[::5] = PLAIN.ignore_index
    upstream.view(-1)[1::7] = 0
    upstream.view(-1)[0] = 0
    return logits.to(device), target.to(device), upstream.to(device)


def run(
    logits: Tensor, target: Tensor, upstream: Tensor, name: Any, **how: Any
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient that reaches whoever made the logits."""
    leaf = logits.detach().clone().requires_grad_()
    made = leaf.view_as(leaf)
    loss = vocab_parallel_cross_entropy(made, target, backend_name=name, **how)
    [gradient] = torch.autograd.grad(loss, made, upstream)
    return loss.detach(), gradient


def check(logits: Tensor, target: Tensor, upstream: Tensor, name: Any, **how: Any) -> None:
    """Loss and gradient are the reference's."""
    options = how.get("options", PLAIN)
    wanted = reference.cross_entropy(logits, target, options)
    wanted_gradient = reference.gradient(logits, target, upstream, options)
    loss, gradient = run(logits, target, upstream, name, **how)
    assert loss.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)
    tolerance = TOLERANCE[logits.dtype]
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "apart"])
def test_loss_and_gradient_are_those_of_fp64(
    variant: str, dtype: torch.dtype, inplace: bool, name: Any
) -> None:
    options = VARIANTS[variant]
    logits, target, upstream = inputs(dtype, vocab_size=options.vocab_size)
    check(logits, target, upstream, name, options=options, inplace_backward=inplace)


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 70),
    st.integers(0, 99),
    st.sampled_from(BACKENDS),
)
def test_any_shape(sequence: int, batch: int, vocab: int, seed: int, name: Any) -> None:
    check(*inputs(shape=(sequence, batch, vocab), seed=seed), name)


def test_row_longer_than_a_block(name: Any) -> None:
    check(*inputs(shape=(2, 1, 4096 + 37)), name)


@pytest.mark.parametrize("kind", ["transposed", "cut", "expanded"])
def test_logits_of_any_strides(kind: str, name: Any) -> None:
    logits, target, upstream = inputs()
    views = {
        "transposed": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "cut": torch.cat([logits, logits], dim=2)[..., : SHAPE[2]],
        "expanded": logits[:, :1].expand(SHAPE),
    }
    view = views[kind]
    wanted = reference.gradient(view, target, upstream, PLAIN)
    # An expanded tensor cannot hold a gradient per row.
    inplace = kind != "expanded"
    leaf = view.detach().requires_grad_()
    made = leaf.view_as(leaf)
    loss = vocab_parallel_cross_entropy(made, target, backend_name=name, inplace_backward=inplace)
    torch.testing.assert_close(
        loss.detach().double(), reference.cross_entropy(view, target, PLAIN), rtol=2e-6, atol=2e-6
    )
    [gradient] = torch.autograd.grad(loss, made, upstream)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_that_begin_anywhere(dtype: torch.dtype, offset: int, name: Any) -> None:
    """Odd rows in memory that is not aligned, read and written in vectors all the same."""
    logits, target, upstream = inputs(dtype, (4, 2, 531))
    storage = torch.empty(logits.numel() + offset, dtype=dtype, device=DEVICE)
    made = storage[offset:].view(logits.shape).copy_(logits).requires_grad_()
    loss = vocab_parallel_cross_entropy(made, target, backend_name=name, inplace_backward=False)
    # Gradient apart: aligned otherwise than the logits.
    [gradient] = torch.autograd.grad(loss, made, upstream)
    wanted = reference.gradient(logits, target, upstream, PLAIN)
    torch.testing.assert_close(
        gradient.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    check(made, target, upstream, name)


@pytest.mark.parametrize("kind", ["scalar", "per sample", "transposed"])
def test_upstream_of_any_strides(kind: str, name: Any) -> None:
    logits, target, upstream = inputs()
    views = {
        "scalar": torch.tensor(0.7, device=DEVICE).expand(SHAPE[:2]),
        "per sample": upstream[:1].expand(SHAPE[:2]),
        "transposed": upstream.T.contiguous().T,
    }
    check(logits, target, views[kind], name)


def test_upstream_is_per_token_not_a_scalar(name: Any) -> None:
    logits, target, upstream = inputs()
    # Peers that read it as a scalar read the first.
    upstream[0, 0] = 0
    target[0, 0], target[3, 2], upstream[3, 2] = 1, 4, 0.5
    changed = upstream.clone()
    changed[3, 2] = -1
    _, before = run(logits, target, upstream, name)
    _, after = run(logits, target, changed, name)
    assert (before[0, 0] == 0).all()
    assert torch.equal(after[3, 2], -2 * before[3, 2])
    after[3, 2] = before[3, 2]
    assert torch.equal(after, before)
    assert before.abs().sum() > 0


def test_half_precision_losses_are_not_rounded_to_it(name: Any) -> None:
    logits, target, _ = inputs(torch.bfloat16)
    loss = vocab_parallel_cross_entropy(logits, target, backend_name=name)
    assert (loss != loss.bfloat16().float()).any()


def test_second_backward_raises_instead_of_lying(name: Any) -> None:
    logits, target, upstream = inputs()
    made = logits.requires_grad_() * 1.0
    loss = vocab_parallel_cross_entropy(made, target, backend_name=name)
    loss.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(upstream)


def test_another_reader_of_the_logits_is_told(name: Any) -> None:
    logits, target, upstream = inputs()
    made = logits.requires_grad_() * 1.0
    square = made.square().sum()
    loss = vocab_parallel_cross_entropy(made, target, backend_name=name)
    loss.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_logits_changed_before_backward_are_noticed(name: Any) -> None:
    logits, target, upstream = inputs()
    made = logits.requires_grad_() * 1.0
    loss = vocab_parallel_cross_entropy(made, target, backend_name=name)
    with torch.no_grad():
        made.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(upstream)


@pytest.mark.parametrize("why", ["ignored", "zero upstream"])
def test_nan_in_a_row_that_does_not_count_stays_there(why: str, name: Any) -> None:
    logits, target, upstream = inputs()
    logits[2, 1] = math.nan
    target[2, 1] = PLAIN.ignore_index if why == "ignored" else 3
    upstream[2, 1] = math.nan if why == "ignored" else 0.0
    loss, gradient = run(logits, target, upstream, name)
    assert (gradient[2, 1] == 0).all()
    assert torch.isfinite(gradient).all()
    assert why != "ignored" or loss[2, 1] == 0


def test_minus_infinity_has_no_probability(name: Any) -> None:
    logits, target, upstream = inputs()
    target[:] = 5
    logits[..., 7:] = -math.inf
    check(logits, target, upstream, name)


def test_shard_of_minus_infinity_joins_the_others(name: Any) -> None:
    logits, target, _ = inputs()
    target[:] = 5
    logits[..., SHAPE[2] // 2 :] = -math.inf
    loss, _ = emulated(logits, target, torch.ones(SHAPE[:2], device=DEVICE), 2, PLAIN, name)
    wanted = reference.cross_entropy(logits, target, PLAIN)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)


def test_probability_near_one(name: Any) -> None:
    logits, target, upstream = inputs()
    target[:] = 5
    logits[..., 5] = 30
    check(logits, target, upstream, name)


def test_all_tokens_ignored(name: Any) -> None:
    logits, target, upstream = inputs()
    target[:] = PLAIN.ignore_index
    loss, gradient = run(logits, target, upstream, name)
    assert (loss == 0).all()
    assert (gradient == 0).all()


def test_label_outside_the_vocabulary_is_not_a_number(name: Any) -> None:
    logits, target, _ = inputs()
    target[0, 1], target[0, 2] = SHAPE[2], -1
    loss = vocab_parallel_cross_entropy(logits, target, backend_name=name)
    assert torch.isnan(loss[0, 1:]).all()
    assert torch.isfinite(loss[1:]).all()


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_sums_of_the_samples_and_their_gradient(variant: str, name: Any) -> None:
    options = VARIANTS[variant]
    # More tokens a sample than one program joins.
    logits, target, _ = inputs(shape=(260, 3, 110), vocab_size=options.vocab_size)
    mask = (torch.arange(780).view(260, 3) % 7 > 1).float().to(DEVICE)
    mask[:, 1] = 0
    weights = torch.tensor([0.3, -1.2, 2.0], device=DEVICE)
    leaf = logits.detach().clone().requires_grad_()
    losses, sums = vocab_parallel_cross_entropy_sums(
        leaf.view_as(leaf), target, mask, options=options, backend_name=name
    )
    wanted = reference.cross_entropy(logits, target, options) * mask
    assert torch.equal(sums.tokens, mask.sum(dim=0))
    torch.testing.assert_close(
        sums.loss_sum.detach().double(), wanted.sum(dim=0), rtol=2e-6, atol=2e-6
    )
    assert not sums.tokens.requires_grad
    both = torch.rand_like(mask)
    [gradient] = torch.autograd.grad((sums.loss_sum * weights).sum() + (losses * both).sum(), leaf)
    wanted_gradient = reference.gradient(logits, target, mask * weights + both, options)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2e-6, atol=2e-6)


def test_masked_token_that_is_not_a_number_stays_out_of_its_sample(name: Any) -> None:
    logits, target, _ = inputs()
    target.clamp_(min=0)
    logits[2, 1] = math.nan
    mask = torch.ones(SHAPE[:2], device=DEVICE)
    mask[2, 1] = 0
    leaf = logits.detach().clone().requires_grad_()
    _, sums = vocab_parallel_cross_entropy_sums(leaf.view_as(leaf), target, mask, backend_name=name)
    [gradient] = torch.autograd.grad(sums.loss_sum.sum(), leaf)
    assert torch.isfinite(sums.loss_sum).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[2, 1] == 0).all()


def test_common_offset_costs_no_digits(name: Any) -> None:
    logits, target, upstream = inputs()
    # Exact in fp32, whose spacing at 1000 is 6e-5.
    logits = (logits * 64).round() / 64
    loss, _ = run(logits + 1000, target, upstream, name)
    wanted = reference.cross_entropy(logits, target, PLAIN)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)


SMALL: dict[str, Callable[[], CrossEntropyBackend]] = {
    "triton": lambda: TritonBackend(Launch(forward_block=16, forward_blocks=2, backward_block=32)),
    "cuda": lambda: CudaBackend(CudaLaunch(forward_columns=32, backward_columns=30)),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("small", SMALL)
def test_row_in_several_parts(shards: int, small: str) -> None:
    options = VARIANTS["all"]
    logits, target, upstream = inputs(shape=(6, 3, 136), vocab_size=options.vocab_size)
    upstream = torch.where(target == PLAIN.ignore_index, 0.0, upstream)
    loss, gradient = emulated(logits, target, upstream, shards, options, SMALL[small]())
    wanted = reference.cross_entropy(logits, target, options)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)
    wanted_gradient = reference.gradient(logits, target, upstream, options)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2e-6, atol=2e-6)


def test_offsets_beyond_two_to_the_31(name: Any) -> None:
    far = 2**31 + 11
    # Untouched pages of it cost no memory.
    storage = torch.empty(far + 64, dtype=torch.bfloat16, device=DEVICE)
    logits = storage.as_strided((2, 1, 64), (far, 64, 1))
    values, target, upstream = inputs(torch.bfloat16, (2, 1, 64))
    target[:] = 9
    upstream[:] = 0.5
    logits.copy_(values)
    made = logits.requires_grad_().view_as(logits)
    loss = vocab_parallel_cross_entropy(made, target, backend_name=name)
    torch.testing.assert_close(
        loss.detach().double(), reference.cross_entropy(values, target, PLAIN), rtol=2e-6, atol=2e-6
    )
    [gradient] = torch.autograd.grad(loss, made, upstream)
    wanted = reference.gradient(values, target, upstream, PLAIN)
    torch.testing.assert_close(gradient.double(), wanted, rtol=8e-3, atol=8e-3)


def test_results_repeat_bit_for_bit(name: Any) -> None:
    logits, target, upstream = inputs(torch.bfloat16)
    first, second = (run(logits, target, upstream, name) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def emulated(
    logits: Tensor,
    target: Tensor,
    upstream: Tensor,
    shards: int,
    options: CrossEntropyOptions,
    name: Any,
) -> tuple[Tensor, Tensor]:
    """What `shards` tensor-parallel ranks would compute together, in this process."""
    passes = backend(name) if isinstance(name, str) else name
    width = logits.shape[2] // shards
    vocab_size = options.vocab_size or logits.shape[2]
    columns = logits.chunk(shards, dim=2)
    parts = [
        Shard(rank * width, min(width, vocab_size - rank * width), vocab_size)
        for rank in range(shards)
    ]
    tables = [
        passes.merge(passes.statistics(part, target, shard, options))
        for part, shard in zip(columns, parts, strict=True)
    ]
    loss, lse, _ = passes.combine(torch.cat(tables), target, parts[0], options, None)
    gradients = []
    for part, shard in zip(columns, parts, strict=True):
        out = torch.empty_like(part)
        passes.gradient(part, target, lse, upstream, shard, options, out)
        gradients.append(out)
    return loss, torch.cat(gradients, dim=2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [2, 4])
def test_shards_together_are_the_whole(variant: str, shards: int, name: Any) -> None:
    options = VARIANTS[variant]
    shape = (6, 3, 136)
    logits, target, upstream = inputs(shape=shape, vocab_size=options.vocab_size)
    if options.vocab_size and shards == 4:
        options = CrossEntropyOptions(**(vars(options) | {"vocab_size": 3 * 34 + 5}))
    loss, gradient = emulated(logits, target, upstream, shards, options, name)
    wanted = reference.cross_entropy(logits, target, options)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)
    wanted_gradient = reference.gradient(logits, target, upstream, options)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2e-6, atol=2e-6)


def whole_vocabulary(options: CrossEntropyOptions) -> tuple[Tensor, Tensor, Tensor]:
    """What two ranks share. The ranks talk over gloo, on the CPU on any machine."""
    return inputs(shape=(6, 3, 136), vocab_size=options.vocab_size, device="cpu")


def on_rank(variant: str, compiled: bool) -> tuple[Tensor, Tensor]:
    from megatron.core import parallel_state

    options = VARIANTS[variant]
    logits, target, upstream = whole_vocabulary(options)
    group = parallel_state.get_tensor_model_parallel_group()
    mine = logits.chunk(2, dim=2)[group.rank()]
    if not compiled:
        return run(mine, target, upstream, "torch", tp_group=group, options=options)
    leaf = mine.clone().requires_grad_()

    def function(leaf: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(
            leaf, target, group, options=options, backend_name="torch"
        )

    loss = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_tensor_parallel_ranks(variant: str, compiled: bool) -> None:
    ranks = run_ranks(2, on_rank, variant, compiled, tensor_model_parallel_size=2)
    options = VARIANTS[variant]
    logits, target, upstream = whole_vocabulary(options)
    wanted = reference.cross_entropy(logits, target, options)
    for loss, _ in ranks:
        torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)
    gradient = torch.cat([part for _, part in ranks], dim=2)
    wanted_gradient = reference.gradient(logits, target, upstream, options)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2e-6, atol=2e-6)


def test_torch_backend_holds_no_copy_of_the_logits() -> None:
    """Peak resident memory of a fresh process, forward and backward, over that of its logits."""
    code = """
import resource, torch
from megatron_rw.kernels import vocab_parallel_cross_entropy
torch.set_num_threads(1)
def step(sequence):
    logits = torch.randn(sequence, 1, 32000).bfloat16().requires_grad_()
    target = torch.zeros(sequence, 1, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = logits.view_as(logits)
    vocab_parallel_cross_entropy(made, target, backend_name="torch").sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, logits.nbytes
step(8)
# The random fp32 logits that they are made from are what the peak is measured above.
extra, size = step(2048)
print(extra / size)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert float(result.stdout) < 0.25


@pytest.mark.parametrize(
    "broken",
    [
        {"z_loss": -1.0},
        {"label_smoothing": 1.0},
        {"softcap": 0.0},
        {"vocab_size": 1},
    ],
)
def test_impossible_options_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(broken))):
        CrossEntropyOptions(**broken)


def test_wrong_inputs_are_refused() -> None:
    logits, target, _ = inputs()
    with pytest.raises(ValueError, match=r"logits must be \[s, b, v\]"):
        vocab_parallel_cross_entropy(logits, target.T)
    with pytest.raises(ValueError, match="float64"):
        vocab_parallel_cross_entropy(logits.double(), target)
    with pytest.raises(ValueError, match="vocab_size 131 does not fit"):
        vocab_parallel_cross_entropy(logits, target, None, CrossEntropyOptions(vocab_size=131))
    with pytest.raises(ValueError, match=r"loss_mask must be \[s, b\]"):
        vocab_parallel_cross_entropy_sums(logits, target, target.T)
    with pytest.raises(ValueError, match="have no elements"):
        vocab_parallel_cross_entropy(logits[:0], target[:0])


def test_backend_is_chosen_by_call_variable_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_RW_KERNELS", raising=False)
    assert default_backend(torch.device("cpu")) == "torch"
    assert default_backend(torch.device("cuda")) == "triton"
    monkeypatch.setenv("MEGATRON_RW_KERNELS", "torch")
    assert default_backend(torch.device("cuda")) == "torch"
    use_backend("triton")
    assert default_backend(torch.device("cpu")) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="the Triton kernels need a GPU"):
        check_backend(torch.device("cpu"))
    use_backend(None)
    monkeypatch.setenv("MEGATRON_RW_KERNELS", "metal")
    with pytest.raises(
        ValueError, match="MEGATRON_RW_KERNELS=metal: choose one of torch, triton, cuda"
    ):
        default_backend(torch.device("cpu"))
