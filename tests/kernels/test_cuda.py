"""The CUDA C++ kernels as a library: built, registered, checked. What they compute is in the suite.

Without a GPU the operators run emulated, which conftest.py sees to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rw.kernels import (
    CrossEntropyOptions,
    cuda_library,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_sums,
    weigh_samples,
)
from megatron_rw.kernels.options import Shard
from megatron_rw.kernels.passes import backend
from megatron_rw.kernels.selection import BackendError, check_backend
from tests.kernels import emulation, reference
from tests.kernels.resources import resources

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURES = [
    pytest.param("80", marks=pytest.mark.long),
    pytest.param("90a", marks=pytest.mark.long),
    "100",
]
OPTIONS = CrossEntropyOptions(z_loss=1e-2, label_smoothing=0.1, softcap=5.0)


def inputs(sequence: int = 5, batch: int = 2, width: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sequence, batch, width, generator=generator)
    target = torch.randint(0, width, (sequence, batch), generator=generator)
    mask = (torch.arange(sequence * batch).view(sequence, batch) % 4 > 0).float()
    return logits.to(DEVICE), target.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(
    architecture: str, record_resources: Callable[..., None]
) -> None:
    kernels = resources(architecture)
    for kernel in kernels:
        record_resources(kernel)
    # Three passes in three dtypes and two variants, targets in three dtypes, rows scaled in three
    # and to two others, and three kernels of one kind.
    assert len({kernel.kernel for kernel in kernels}) == 3 * 3 * 2 + 3 + 3 + 2 + 3
    assert {kernel.kernel for kernel in kernels if kernel.spilled or kernel.stack} == set()
    assert all(0 < kernel.registers <= 64 for kernel in kernels)


@pytest.mark.long
@pytest.mark.parametrize("sanitizers", [("address", "undefined"), ("thread",)], ids=" ".join)
def test_sanitizers_find_nothing(sanitizers: tuple[str, ...]) -> None:
    program = emulation.exercise(*sanitizers)
    variables = os.environ | {"EMULATED_THREADS": "96"}
    result = subprocess.run([program], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        pytest.skip("needs compute-sanitizer")
    program = emulation.exercise_on_gpu(tmp_path / "exercise")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_operators_pass_torchs_own_check() -> None:
    cuda_library.load(DEVICE)
    operators = torch.ops.megatron_rw_cuda
    logits, target, mask = inputs()
    target.clamp_(max=64)
    passes, shard = backend("cuda"), Shard(0, 65, 65)
    tables = passes.statistics(logits, target, shard, OPTIONS)
    lse = passes.combine(tables, target, shard, OPTIONS, None).lse
    losses = torch.rand(40, device=DEVICE)
    two, out = torch.tensor([0.2, 0.8], device=DEVICE), torch.zeros_like(logits)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.statistics, (logits, target, 0, 65, -100, 5.0, True, 64, 32)),
        (operators.statistics, (logits.bfloat16(), target, 0, 70, -100, 0.0, False, 64, 4096)),
        (operators.merge, (tables.repeat(3, 1, 1, 1),)),
        (operators.combine, (tables, target, None, 65, -100, 0.0, 0.1)),
        (operators.combine, (tables, target, mask, 65, -100, 0.0, 0.1)),
        (
            operators.gradient,
            (*(logits, target, lse, mask, 0, 65, -100, 5.0, 0.0, 0.1, 0.1 / 65, 64, 32), out),
        ),
        (operators.probabilities, (logits.clone(), target, 0, 65, -100, 5.0, 64)),
        (operators.probabilities, (logits.bfloat16(), target, 0, 70, -100, 0.0, 512)),
        (
            operators.subtract_targets,
            (logits.clone(), tables[:, :3].contiguous(), target, lse, 0, 65, -100, 5.0, 0.1, 9.0),
        ),
        (operators.scale_rows, (logits[0], losses[:2], out[0])),
        (operators.weigh, (losses, None, None, None, 0.4, 1, 1.0, 1.0)),
        (operators.weigh, (losses, losses > 0.1, two, two[0].clone(), 0.0, 2, 1.0, 1.0)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("masked", [False, True], ids=["losses", "with sums"])
def test_operator_of_the_whole_loss_passes_torchs_own_check(name: str, masked: bool) -> None:
    logits, target, mask = inputs()
    logits.requires_grad_()
    arguments = (logits, target, mask if masked else None, None, 0, 70, 70, -100, 0.01, 0.1, 5.0)
    torch.library.opcheck(torch.ops.megatron_rw.cross_entropy.default, (*arguments, name))


@pytest.mark.parametrize(
    ("compiler", "name"),
    [
        ("aot_eager", "torch"),
        ("aot_eager", "cuda"),
        pytest.param("inductor", "torch", marks=pytest.mark.long),
        pytest.param("inductor", "cuda", marks=pytest.mark.long),
    ],
)
def test_loss_and_weights_compile_to_one_graph(name: Any, compiler: str) -> None:
    leaf, target, mask = inputs(8, 4, 90)
    leaf.requires_grad_()

    def loss(leaf: Tensor) -> Tensor:
        logits = leaf * 2
        _, sums = vocab_parallel_cross_entropy_sums(
            logits, target, mask, options=OPTIONS, backend_name=name
        )
        means = (sums.loss_sum / sums.tokens).detach()
        weights = weigh_samples(means, "linupper", 0.4, backend_name=name).weights
        # Others read the logits, which backward must then leave as they are.
        plain = vocab_parallel_cross_entropy(logits, target, backend_name=name)
        return (weights * sums.loss_sum).sum() + plain.mean() + logits.square().mean()

    def exact(leaf: Tensor) -> Tensor:
        logits = leaf * 2
        sums = (reference.cross_entropy(logits, target, OPTIONS) * mask).sum(dim=0)
        weights = weigh_samples((sums / mask.sum(dim=0)).detach(), "linupper", 0.4).weights
        plain = reference.cross_entropy(logits, target, CrossEntropyOptions())
        return (weights * sums).sum() + plain.mean() + logits.square().mean()

    torch.compiler.reset()
    made = torch.compile(loss, fullgraph=True, backend=compiler)(leaf)
    [gradient] = torch.autograd.grad(made, leaf)
    copy = leaf.detach().double().requires_grad_()
    wanted = exact(copy)
    [wanted_gradient] = torch.autograd.grad(wanted, copy)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["torch", "triton", "cuda"])
def test_sample_longer_than_one_block_joins(name: str) -> None:
    sequence, batch = 2 * 8192 + 100, 2
    cuda_library.load(DEVICE)
    logits, target, mask = inputs(sequence, batch, 3)
    shard, options = Shard(0, 3, 3), CrossEntropyOptions()
    tables = backend("torch").statistics(logits, target, shard, options)
    losses, _, sums = backend(name).combine(tables, target, shard, options, mask)
    assert sums is not None
    wanted = reference.cross_entropy(logits, target, options)
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        sums.loss_sum.double(), (wanted * mask).sum(dim=0), rtol=1e-6, atol=0
    )
    assert torch.equal(sums.tokens, mask.sum(dim=0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("statistics(logits, labels, 0, 70, -100, 0.0, False, 48, 64)", "multiple of 32"),
        ("statistics(logits, labels, 0, 71, -100, 0.0, False, 64, 64)", "within the logits"),
        ("statistics(logits, labels.int(), 0, 70, -100, 0.0, False, 64, 64)", "target is of the"),
        ("statistics(logits, labels[:2], 0, 70, -100, 0.0, False, 64, 64)", r"must be \[s, b\]"),
        ("statistics(logits.double(), labels, 0, 70, -100, 0.0, False, 64, 64)", "must be float32"),
        ("weigh(logits[0, 0].double(), None, None, None, 1.0, 1, 1.0, 1.0)", "wrong dtype"),
        ("weigh(logits[0, 0, ::2], None, None, None, 1.0, 1, 1.0, 1.0)", "must be contiguous"),
        ("weigh(logits[0, 0], None, None, None, 1.0, 4, 1.0, 1.0)", "no strategy 4"),
    ],
)
def test_operators_refuse_what_they_cannot_take(call: str, message: str) -> None:
    cuda_library.load(DEVICE)
    logits, labels, _ = inputs()
    names = {"logits": logits, "labels": labels}
    with pytest.raises(RuntimeError, match=message):
        eval(f"operators.{call}", {"operators": torch.ops.megatron_rw_cuda, **names})


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a Hopper GPU to build for and no library yet; its cache."""
    monkeypatch.setattr(cuda_library, "_loaded_for", set())
    monkeypatch.setattr(cuda_library, "packaged", lambda: tmp_path / "nothing.so")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("MEGATRON_RW_CUDA_LIBRARY", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MEGATRON_RW_KERNELS", "cuda")
    return tmp_path / "cache"


def has_kernels_for(library: Path, key: str) -> bool:
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("megatron_rw_cuda::weigh", {key!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip() == "True"


@pytest.mark.long
def test_built_at_first_use_and_kept(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", used.append)
    monkeypatch.setattr(cuda_library, "_has_kernels", lambda key: True)
    check_backend(torch.device("cuda"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0] == f"building the CUDA kernels, once: {used[0]}"
    assert used[0].name.endswith("_sm_90a.so")
    assert has_kernels_for(used[0], "CUDA")
    assert not has_kernels_for(used[0], "CPU")
    cuda_library._loaded_for.clear()
    check_backend(torch.device("cuda"))
    assert used[1] == used[0]
    assert capsys.readouterr().out == ""
    assert sorted(path.suffix for path in bare.iterdir()) == [".lock", ".so"]


@pytest.mark.long
def test_built_with_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    variables = os.environ | {"MEGATRON_RW_BUILD_CUDA": "1"}
    subprocess.run(command, cwd=ROOT, env=variables, check=True)
    library = tmp_path / "megatron_rw" / "kernels" / cuda_library.packaged().name
    assert has_kernels_for(library, "CUDA")


def test_no_compiler(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(BackendError, match=r"no nvcc was found .* set CUDA_HOME to it"):
        check_backend(torch.device("cuda"))


def test_compiler_that_fails(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "SOURCES", ("missing.cu",))
    with pytest.raises(BackendError, match=r"(?s)failed:.*missing.cu.*--reweight-kernels triton"):
        check_backend(torch.device("cuda"))
    assert [path.suffix for path in bare.iterdir()] == [".lock"]


def test_cache_that_cannot_be_written(bare: Path) -> None:
    bare.write_text("a file")
    with pytest.raises(BackendError, match="Set TORCH_EXTENSIONS_DIR to a folder that can be"):
        check_backend(torch.device("cuda"))


def test_no_gpu(bare: Path) -> None:
    with pytest.raises(BackendError, match="need a GPU, and this run is on device cpu"):
        check_backend(torch.device("cpu"))


def test_library_that_is_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RW_CUDA_LIBRARY", str(bare / "x.so"))
    with pytest.raises(BackendError, match=r"MEGATRON_RW_CUDA_LIBRARY=.*x.so: there is no such"):
        check_backend(torch.device("cuda"))
    bare.mkdir()
    (bare / "x.so").write_text("no library")
    with pytest.raises(BackendError, match="is no library of CUDA kernels for here"):
        check_backend(torch.device("cuda"))
