"""Triton's kernels compile for the GPUs they are meant for, on a machine that has none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import itertools, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_rw.kernels import triton_backend as ce, triton_probabilities as layer
from megatron_rw.kernels import triton_weights as weights

POINTERS = {"target": "*i64", "mask": "*i1", "logits": "*bf16", "probabilities": "*bf16",
            "matrix": "*bf16"}
BUFFERS = ("tables", "losses", "lses", "lse", "sums", "upstream", "loss_mask", "given_range",
           "weights", "statistics", "out", "table", "scale")
FLOATS = ("softcap", "z_loss", "smoothing", "uniform", "delta", "largest_score", "temperature",
          "largest")
LAUNCH = ce.LAUNCH

def type_of(kernel, name, constexprs):
    if name in constexprs:
        return "constexpr"
    if kernel in (ce._gradient_kernel, layer._scale_rows_kernel) and name == "out":
        return "*bf16"
    if name == "temperature" and constexprs["TEMPERATURE_ON_DEVICE"]:
        return "*fp32"
    if name in BUFFERS:
        return "*fp32"
    default = "fp32" if name in FLOATS else "i64" if "stride" in name else "i32"
    return POINTERS.get(name, default)

def check(kernel, warps, **choices):
    names = list(choices)
    for values in itertools.product(*choices.values()):
        constexprs = dict(zip(names, values))
        signature = {name: type_of(kernel, name, constexprs) for name in kernel.arg_names}
        target = GPUTarget("cuda", int(sys.argv[1]), 32)
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs), target=target, options={"num_warps": warps}
        )
        assert len(compiled.asm["cubin"]) > 0

both = (False, True)
check(ce._statistics_kernel, LAUNCH.forward_warps, CAPPED=both, WITH_SUM=both,
      BLOCK=(LAUNCH.forward_block,), BLOCKS=(LAUNCH.forward_blocks,))
check(ce._merge_kernel, 4, WITH_SUM=both, TOKENS=(ce.COMBINED_TOKENS,))
check(ce._combine_kernel, 4, WITH_SUM=both, MASKED=both, TOKENS=(ce.COMBINED_TOKENS,))
check(ce._gradient_kernel, LAUNCH.backward_warps, CAPPED=both, BLOCK=(LAUNCH.backward_block,))
check(layer._probabilities_kernel, layer.LAUNCH.warps, CAPPED=both, BLOCK=(layer.LAUNCH.block,))
check(layer._subtract_targets_kernel, 1, CAPPED=both, BLOCK=(1024,))
check(layer._scale_rows_kernel, 4, BLOCK=(2048,))
check(weights._weigh_kernel, weights.MOST_WARPS, STRATEGY=(1, 2), MASKED=both, GIVEN=both,
      TEMPERATURE_ON_DEVICE=(True,), BLOCK=(weights.LARGEST_BLOCK,))
check(weights._weigh_kernel, 1, STRATEGY=(0, 3), MASKED=(True,), GIVEN=(False,),
      TEMPERATURE_ON_DEVICE=(False,), BLOCK=(1, 32))
"""


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile(architecture: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, architecture]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
