"""What a job will need, by Megatron's own formulas. Nothing here is measured.

`megatron.training.theoretical_memory_usage` has the memory of the fullest GPU,
`num_floating_point_operations` the work of a step. What the first leaves out is listed with each
result (`limits`), with the direction in which it errs.
"""

import contextlib
import copy
import io
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training.theoretical_memory_usage import (
    NUM_BYTES_IN_MEGABYTE,
    compute_weight_and_optimizer_memory,
    report_theoretical_memory,
)
from megatron.training.training import num_floating_point_operations
from megatron.training.utils import is_hybrid_model

from megatron_rw.preflight.command import PreflightConfig
from megatron_rw.preflight.facts import amount
from megatron_rw.training.arguments import parse_job_flags

# Megatron's formula for a parameter whose optimizer state is not distributed.
_BYTES_PER_PARAMETER = 18
# Dense, of one H100 SXM by NVIDIA's data sheet; fp32 without tensor cores.
PEAK_TFLOPS = {16: 989.0, 32: 67.0}


@dataclass(frozen=True)
class Estimate:
    """What a job will need."""

    gpus: int  # Processes, one a GPU.
    parameters: float  # Of the whole model, without biases and position embeddings.
    weights_bytes: float  # Weights, gradients and optimizer state on the fullest GPU.
    activation_bytes: float  # Activations there.
    checkpoint_bytes: float  # A whole checkpoint, with Adam's state unless --no-save-optim.
    steps: int
    tokens: int
    operations: float  # Floating-point operations of all steps.
    bits: int  # Of the operands of matrix products.
    limits: tuple[str, ...]  # What the memory formula leaves out, in words.

    @property
    def memory_bytes(self) -> float:
        """Weights, gradients, optimizer state and activations on the fullest GPU."""
        return self.weights_bytes + self.activation_bytes

    def hours(self, peak_tflops: float | None, mfu: float) -> float:
        """Returns the time of training alone, without start, evaluation and checkpoints.

        Without a peak it is that of an H100. The model FLOPs utilisation, from 0 to 1, is assumed.
        """
        rate = self.gpus * (peak_tflops or PEAK_TFLOPS[self.bits]) * 1e12 * mfu
        return self.operations / rate / 3600

    def lines(self, assumed: PreflightConfig | None) -> Iterator[str]:
        """Yields the estimate as text, with the time only where peak and utilisation are given."""
        yield ""
        yield f"estimate for {self.gpus} GPUs by Megatron's formulas, nothing of it measured"
        yield f"  parameters          {self.parameters:,.0f}"
        yield (
            f"  memory              {amount(self.memory_bytes)} on the fullest GPU: weights, "
            f"gradients and optimizer {amount(self.weights_bytes)}, activations "
            f"{amount(self.activation_bytes)}"
        )
        yield f"  a checkpoint        {amount(self.checkpoint_bytes)}"
        work = f"{self.steps:,} steps, {self.tokens:,} tokens, {self.operations:.2e} operations"
        yield f"  work                {work}"
        if assumed is not None:
            peak, mfu = assumed.peak_tflops or PEAK_TFLOPS[self.bits], assumed.assumed_mfu
            rate = f"{mfu:.0%} of {peak:g} TFLOP/s a GPU, which is assumed"
            yield f"  time                {self.hours(peak, mfu):,.1f} h at {rate}"
        for limit in self.limits:
            yield f"  note                {limit}"


def planned_arguments(flags: Sequence[str], gpus: int) -> Namespace:
    """Returns the arguments of a job of that many GPUs, on a machine that need not have any."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus)}
    # Megatron's default, which ours gives up where Transformer Engine is not installed.
    return parse_job_flags(["--transformer-impl", "transformer_engine", *flags], "cuda").megatron


def estimate(args: Namespace) -> Estimate | None:
    """Asks Megatron's formulas about validated arguments; Megatron's globals have to be set.

    Returns None for a hybrid model, which Megatron has no formula for.
    """
    if is_hybrid_model(args):
        return None
    # The formulas write to the arguments that they are given.
    args = copy.copy(args)
    with contextlib.redirect_stdout(io.StringIO()):
        weights, activations, _ = report_theoretical_memory(args, get_num_microbatches())
    parameters = _count_parameters(args)
    batch = args.global_batch_size
    steps = args.train_iters or math.ceil((args.train_samples or 0) / batch)
    return Estimate(
        gpus=args.world_size,
        parameters=parameters,
        weights_bytes=weights * NUM_BYTES_IN_MEGABYTE,
        activation_bytes=activations * NUM_BYTES_IN_MEGABYTE,
        checkpoint_bytes=parameters * _saved_bytes_per_parameter(args),
        steps=steps,
        tokens=steps * batch * args.seq_length,
        operations=steps * num_floating_point_operations(args, batch),
        bits=_bits(args),
        limits=tuple(limits(args)),
    )


def _count_parameters(args: Namespace) -> float:
    """Counts the parameters of the whole model, as Megatron's memory formula does.

    The formula prints their number with two digits only. Where nothing is distributed its result
    is a fixed number of bytes for each parameter.
    """
    whole = copy.copy(args)
    whole.tensor_model_parallel_size = whole.pipeline_model_parallel_size = 1
    whole.expert_tensor_parallel_size = whole.expert_model_parallel_size = 1
    whole.use_distributed_optimizer = False
    return float(compute_weight_and_optimizer_memory(whole)) / _BYTES_PER_PARAMETER


def _saved_bytes_per_parameter(args: Namespace) -> int:
    """Counts a checkpoint's bytes: the weight, and for Adam the fp32 weight and both moments."""
    weight = _bits(args) // 8
    if args.no_save_optim:
        return weight
    # In fp32 the weight is its own main copy, unless shards of it are saved with the moments.
    main = 4 if weight < 4 or args.use_distributed_optimizer else 0
    return weight + main + 4 + 4


def limits(args: Namespace) -> list[str]:
    """Lists what Megatron's memory formula leaves out, and to which side it errs by that."""
    fp32, recompute = _bits(args) == 32, args.recompute_granularity
    left_out = {
        "too low by CUDA's context, NCCL's buffers, fragmentation and the loss's fp32 logits": True,
        "activations too low: they are counted with 2 bytes, and take 4 in fp32, where attention "
        "keeps its scores besides": fp32,
        "activations too low: --transformer-impl local keeps attention's scores": (
            not fp32 and args.transformer_impl == "local" and recompute is None
        ),
        "activations too high: full recomputation is not in the formula": recompute == "full",
        "activations too high: --sequence-parallel is in the formula with --recompute-activations "
        "alone": args.sequence_parallel and recompute is None,
        "activations too high: --context-parallel-size is not in the formula": (
            args.context_parallel_size > 1
        ),
        "activations of experts are not in the formula": args.num_experts is not None,
        "weights too high: FSDP is not in the formula": (
            args.use_megatron_fsdp or args.use_torch_fsdp2
        ),
    }
    return [text for text, applies in left_out.items() if applies]


def _bits(args: Namespace) -> int:
    return 16 if args.bf16 or args.fp16 else 32
