"""Flags that are unknown, impossible, contradictory or without effect."""

from __future__ import annotations

from tests.refusals.cases import Case

FLAGS = (
    Case(
        "unknown flag",
        "--reweigth-strategy linupper",
        "unrecognized arguments: --reweigth-strategy linupper. Did you mean --reweight-strategy",
    ),
    Case(
        "unknown strategy",
        "--reweight-strategy upper",
        "argument --reweight-strategy: invalid choice: 'upper'",
    ),
    Case(
        "not a number",
        "--reweight-delta much",
        "argument --reweight-delta: invalid float value",
    ),
    Case(
        "setting without strategy",
        "--reweight-temperature 0.4",
        "--reweight-temperature without a strategy does nothing: add --reweight-strategy",
    ),
    Case(
        "impossible temperature",
        "--reweight-strategy linupper --reweight-temperature 0",
        "--reweight-temperature must be a finite number above 0, not 0.0",
    ),
    Case(
        "samples without a log",
        "--reweight-strategy linupper --reweight-log-samples 4",
        "--reweight-log-samples writes to metrics.jsonl: add --log-dir DIR",
    ),
    Case(
        "skipping without the check",
        "--on-nonfinite skip-step --no-check-for-nan-in-loss-and-grad",
        "--on-nonfinite skip-step without Megatron's check does nothing: drop it, or",
    ),
    Case(
        "skips that nothing counts",
        "--max-consecutive-skips 3",
        "--max-consecutive-skips without --on-nonfinite skip-step does nothing",
    ),
    Case(
        "spikes below the mean",
        "--loss-spike-factor 1",
        "--loss-spike-factor must be a finite number above 1, not 1.0",
    ),
    Case(
        "spikes without a log",
        "--loss-spike-factor 2",
        "--loss-spike-factor writes to spikes.jsonl: add --log-dir DIR",
    ),
    Case(
        "one sample",
        "--reweight-strategy linupper --micro-batch-size 1",
        "one sample always has weight 1: raise --micro-batch-size, or use --reweight-scope global",
    ),
    Case(
        "16-bit losses",
        "--reweight-strategy linupper --fp16-lm-cross-entropy --fp16",
        "--fp16-lm-cross-entropy rounds the losses to 16 bits",
    ),
    Case(
        "one sample per step",
        "--reweight-strategy linupper --reweight-scope global --micro-batch-size "
        "1 --global-batch-size 1",
        "within --global-batch-size 1 sample, and one sample always has weight 1:"
        " raise --global-batch-size",
    ),
    Case(
        "auxiliary loss scaled with the gradients",
        "--reweight-strategy linupper --reweight-scope deferred --num-experts 2 "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2",
        "would scale the losses of --moe-aux-loss-coeff with them: use "
        "--reweight-scope microbatch or global",
    ),
    Case(
        "temperature that underflows",
        "--reweight-strategy linupper --reweight-scope deferred --reweight-temperature 0.01",
        "--reweight-temperature 0.01 is too low for --reweight-scope deferred",
    ),
    Case(
        "decay without moments",
        "--reweight-strategy linupper --reweight-moment-decay 0.5",
        "--reweight-moment-decay acts on --reweight-scope deferred alone",
    ),
    Case(
        "two cross-entropies",
        "--cross-entropy-impl fused --cross-entropy-loss-fusion",
        "--cross-entropy-impl fused takes the place of what --cross-entropy-loss-fusion chooses",
    ),
    Case(
        "loss fusion without logits",
        "--fused-linear-cross-entropy --cross-entropy-loss-fusion",
        "--cross-entropy-loss-fusion acts on logits, which there are none of: "
        "drop it, or --fused-linear-cross-entropy",
    ),
    Case(
        "our cross-entropy without logits",
        "--fused-linear-cross-entropy --cross-entropy-impl fused",
        "--cross-entropy-impl fused acts on logits, which there are none of: drop it, or",
    ),
    Case(
        "output layer in FP8",
        "--fused-linear-cross-entropy --fp8-output-proj",
        "--fp8-output-proj computes the output layer in FP8, with products of its own: drop it",
    ),
    Case(
        "budget for nothing",
        "--logits-budget-mib 100",
        "--logits-budget-mib without --fused-linear-cross-entropy does nothing",
    ),
    Case(
        "budget too small",
        "--fused-linear-cross-entropy --logits-budget-mib 1 --make-vocab-size-divisible-by 4096",
        "--logits-budget-mib 1: a budget of 1 MiB for logits is too small for 256"
        " tokens of 32 hidden units: 4 MiB is the least, and 9 MiB keeps all "
        "logits",
    ),
    Case(
        "budget below nothing",
        "--fused-linear-cross-entropy --logits-budget-mib 0",
        "--logits-budget-mib must be above 0, not 0",
    ),
    Case(
        "kernels that nothing uses",
        "--reweight-kernels torch",
        "--reweight-kernels torch has nothing to act on: add --reweight-strategy, --fused-linear-",
    ),
    Case(
        "captured step",
        "--reweight-strategy linupper --cuda-graph-impl full_iteration --no-"
        "check-for-nan-in-loss-and-grad",
        "--cuda-graph-impl full_iteration captures a step as it is",
    ),
    Case(
        "world size",
        "--tensor-model-parallel-size 2",
        "1 process(es) cannot hold --tensor-model-parallel-size 2 x",
    ),
    Case(
        "world size on two ranks",
        "--pipeline-model-parallel-size 4",
        "2 process(es) cannot hold --tensor-model-parallel-size 1 x --pipeline-"
        "model-parallel-size 4 x --context-parallel-size 1 = 4: start a multiple "
        "of 4",
        processes=2,
    ),
    Case(
        "batch size",
        "--global-batch-size 12",
        "--global-batch-size 12 is not a multiple of --micro-batch-size 8 x 1",
    ),
    Case(
        "no nccl",
        "--distributed-backend nccl",
        "--distributed-backend nccl needs GPUs",
    ),
    Case(
        "no TE",
        "--transformer-impl transformer_engine",
        "--transformer-impl transformer_engine needs a GPU",
    ),
    Case(
        "no context parallelism",
        "--context-parallel-size 2",
        "--context-parallel-size above 1 needs Transformer Engine's attention",
        processes=2,
    ),
    Case(
        "no sequence parallelism",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--sequence-parallel needs the norms of Transformer Engine or apex",
        processes=2,
    ),
    Case(
        "megatron's own",
        "--num-attention-heads 5",
        "Megatron refuses the arguments: ",
    ),
    Case(
        "long warm-up",
        "--lr-warmup-iters 5 --train-iters 5",
        "--lr-warmup-iters 5 must be below --lr-decay-iters (or else --train-iters), which is 5",
    ),
    Case(
        "no steps",
        "--train-iters 0",
        "give --train-iters or --train-samples",
    ),
)
