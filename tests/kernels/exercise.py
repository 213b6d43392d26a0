"""Runs every CUDA kernel in every variant, for sanitizers to watch.

    compute-sanitizer --tool memcheck python -m tests.kernels.exercise
    LD_PRELOAD=$(g++ -print-file-name=libasan.so) python -m tests.kernels.exercise address undefined

On a GPU where there is one; otherwise emulated, with the sanitizers of the compiler that are named.
Other tests check the values.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys

import torch

from megatron_rw.kernels import CrossEntropyOptions, Units, Weighting, weigh_units
from tests.kernels import DEVICE, emulation
from tests.kernels.operations import PLAIN, inputs, run_on

# Rows of several vectors for each thread, with a head and a tail, and rows without a whole vector.
WIDTHS = (1333, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> int:
    """Run them once; the sanitizer ends the process where it finds something."""
    if DEVICE == "cpu":
        emulation.install(*sys.argv[1:])
    variants = (PLAIN, CrossEntropyOptions(entropy=True))
    for dtype, variant, width in itertools.product(DTYPES, variants, WIDTHS):
        # The last column is padding.
        options = dataclasses.replace(variant, vocab_size=width - 1)
        logits, target, upstream = inputs(dtype, (4, 2, width), options)
        # Shifted by one element, so that rows begin at any address.
        values = logits.flatten()
        shifted = torch.cat([values[:1], values])[1:].view_as(logits)
        how = {"options": options, "loss_mask": upstream * 0 + 1, "of_sums": upstream[0]}
        for operation in ("apart", "in place"):
            run_on(shifted, target, upstream, "cuda", operation, **how)
    for count in (1, 33, 5000):
        losses = torch.rand(count, device=DEVICE)
        plain = Weighting(strategy="quadratic", temperature=0.4)
        searched = Weighting(strategy="softmax", target_ess=0.9, max_weight=1.1, range="quantile")
        plan = weigh_units(Units(losses), plain, backend_name="cuda").plan
        units = Units(losses, losses > 0.1, losses, losses)
        for weighting in (plain, Weighting(strategy="topk"), searched):
            weigh_units(units, weighting, plan, backend_name="cuda")
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
