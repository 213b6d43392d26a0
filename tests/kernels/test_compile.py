"""Triton's kernels compile for the GPUs they are meant for, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_rw.kernels import triton_backend as kernels

def signature(kernel, floats, constexprs):
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name in ("logits", "out") and kernel is kernels._gradient_kernel:
            types[name] = "*bf16"
        elif name == "logits":
            types[name] = "*bf16"
        elif name in ("out", "lse", "upstream"):
            types[name] = "*fp32"
        elif name == "target":
            types[name] = "*i64"
        else:
            types[name] = "fp32" if name in floats else "i64" if "stride" in name else "i32"
    return types

floats = ("softcap", "z_loss", "smoothing", "uniform")
for kernel, constexprs, warps in (
    (kernels._statistics_kernel,
     {"CAPPED": True, "WITH_SUM": True, "BLOCK": kernels.FORWARD_BLOCK}, kernels.FORWARD_WARPS),
    (kernels._gradient_kernel,
     {"CAPPED": True, "BLOCK": kernels.BACKWARD_BLOCK}, kernels.BACKWARD_WARPS),
):
    source = ASTSource(kernel, signature(kernel, floats, constexprs), constexprs)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    assert len(compiled.asm["cubin"]) > 0
"""


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile(architecture: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, architecture]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
