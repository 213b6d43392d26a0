"""Refusals of a model's shape, the number of processes, and what the CPU cannot do."""

from argparse import Namespace

from megatron_rw.errors import UserError
from megatron_rw.training.refusals.base import flag, refuse_flags


def check_shape(args: Namespace) -> None:
    """Checks the model's shape, the number of processes, batch sizes and the warm-up."""
    _check_required(args)
    _check_parallel_sizes(args)
    _check_warmup(args)


def _check_required(args: Namespace) -> None:
    # A checkpoint's arguments may supply the rest.
    is_supplied = args.use_checkpoint_args or args.heterogeneous_layers_config_path is not None
    shape = (
        *("num_layers", "hidden_size", "num_attention_heads"),
        *("seq_length", "max_position_embeddings"),
    )
    needed = ("micro_batch_size",) if is_supplied else (*shape, "micro_batch_size")
    missing = [flag(name) for name in needed if getattr(args, name) is None]
    if missing:
        raise UserError(f"required: {', '.join(missing)}.")
    if not (args.train_iters or args.train_samples or args.skip_train or is_supplied):
        raise UserError("nothing to train for: give --train-iters or --train-samples.")


def _check_parallel_sizes(args: Namespace) -> None:
    model = (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    if args.world_size % model:
        raise UserError(
            f"{args.world_size} process(es) cannot hold --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} x --context-parallel-size "
            f"{args.context_parallel_size} = {model}: start a multiple of {model} "
            "(torchrun --nproc-per-node, --nnodes) or lower one of the three."
        )
    replicas = args.world_size // model
    per_pass = args.micro_batch_size * replicas
    if args.global_batch_size is not None and args.global_batch_size % per_pass:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of "
            f"--micro-batch-size {args.micro_batch_size} x {replicas} data-parallel replicas "
            f"= {per_pass}."
        )


def _check_warmup(args: Namespace) -> None:
    """Checks what Megatron asserts without a message once it has built the model."""
    for warmup, total, unit in (
        (args.lr_warmup_iters, args.lr_decay_iters or args.train_iters, "iters"),
        (args.lr_warmup_samples, args.lr_decay_samples or args.train_samples, "samples"),
    ):
        if warmup and total and warmup >= total:
            raise UserError(
                f"--lr-warmup-{unit} {warmup} must be below --lr-decay-{unit} (or else "
                f"--train-{unit}), which is {total}."
            )


def check_cpu(args: Namespace) -> None:
    """Refuses what needs a GPU."""
    if args.transformer_impl != "local":
        raise UserError(
            f"--transformer-impl {args.transformer_impl} needs a GPU: drop it to run on the CPU."
        )
    if args.distributed_backend == "nccl":
        raise UserError("--distributed-backend nccl needs GPUs: drop it to run on the CPU.")
    why = {
        "fp8": "needs a GPU",
        "fp4": "needs a GPU",
        "sequence_parallel": "needs the norms of Transformer Engine or apex, because Megatron's "
        "plain-torch ones refuse it",
        "context_parallel_size": "above 1 needs Transformer Engine's attention",
    }
    refuse_flags(args, why, "drop it to run on the CPU")
