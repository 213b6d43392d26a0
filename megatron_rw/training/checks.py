"""Refusals before any long work: what is impossible, contradictory or missing, and the remedy."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

import torch
from megatron.training.utils import print_rank_0

from megatron_rw.errors import UserError
from megatron_rw.integrations.output_layer import check_output_layer, plan_of
from megatron_rw.integrations.step import check_scope, check_set_size
from megatron_rw.kernels.selection import check_backend, use_backend
from megatron_rw.observability.checks import check_observability
from megatron_rw.observability.config import MonitoringConfig
from megatron_rw.platform import Device
from megatron_rw.resilience.choose_checkpoint import choose_checkpoint
from megatron_rw.resilience.nonfinite import NonFiniteConfig
from megatron_rw.resilience.refusals import check_bad_numbers
from megatron_rw.resilience.resuming import check_resume
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training.data_checks import (
    check_files,
    check_split,
    check_vocabulary,
    fingerprints,
)
from megatron_rw.training.saving_checks import check_folders, check_saving


def settings_of[Config](config: type[Config], args: Namespace) -> Config:
    """Returns the flags that are fields of a dataclass, as that dataclass."""
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{name: getattr(args, name) for name in names})


def check_launch(args: Namespace, device: Device) -> None:
    """Check what Megatron's own validation would report in its own terms, or too late.

    Args:
        args: parsed, not validated yet.
        device: in use.

    Raises:
        UserError: the first problem found.
    """
    if args.yaml_cfg is None:
        _check_required(args)
        _check_world_size(args)
        _check_batch_size(args)
        _check_warmup(args)
    check_saving(args)
    if device == "cpu":
        _check_cpu(args)
    # Checks itself.
    settings_of(MonitoringConfig, args)
    check_observability(args, device)
    if args.rank == 0:
        # One rank looks, so that 4,096 of them do not ask the file system the same question.
        check_files(args)
        check_folders(args)
        for line in choose_checkpoint(args.load, args.save, args.ckpt_step):
            print(f"> {line}", flush=True)


def check_kernels(args: Namespace, config: ReweightConfig, device: Device) -> None:
    """Choose the kernels and see that they can run.

    Args:
        args: as parsed.
        config: the reweighting settings.
        device: what `platform.select_device` chose.

    Raises:
        UserError: they would not be used.
        BackendError: they cannot run here.
    """
    chosen = args.reweight_kernels
    if chosen != "auto":
        fused = args.fused_linear_cross_entropy or args.cross_entropy_impl == "fused"
        if not config.enabled and not fused:
            raise UserError(
                f"--reweight-kernels {chosen} has nothing to act on: add --reweight-strategy, "
                "--fused-linear-cross-entropy or --cross-entropy-impl fused, or drop the flag."
            )
        use_backend(chosen)
    check_backend(torch.device(device))


def check_run(args: Namespace, config: ReweightConfig) -> None:
    """Check the validated arguments against the data and the reweighting settings.

    Args:
        args: validated by Megatron; the padded vocabulary size is known.
        config: the reweighting settings.

    Raises:
        UserError: the first problem found.
    """
    if args.rank == 0:
        args.data_fingerprints = fingerprints(args)
        check_resume(args, args.allow_changed_data)
        check_split(args)
        check_vocabulary(args)
    if args.cross_entropy_impl == "fused" and args.cross_entropy_loss_fusion:
        raise UserError(
            "--cross-entropy-impl fused takes the place of what --cross-entropy-loss-fusion "
            "chooses: drop one of the two."
        )
    if args.fused_linear_cross_entropy:
        if args.logits_budget_mib is not None and args.logits_budget_mib <= 0:
            raise UserError(f"--logits-budget-mib must be above 0, not {args.logits_budget_mib}.")
        check_output_layer(args)
        plan_of(args)
    elif args.logits_budget_mib is not None:
        raise UserError("--logits-budget-mib without --fused-linear-cross-entropy does nothing.")
    check_bad_numbers(
        settings_of(NonFiniteConfig, args),
        log_dir=args.log_dir,
        checks=args.check_for_nan_in_loss_and_grad,
        megatron_fsdp=args.use_megatron_fsdp,
        cuda_graph_impl=args.cuda_graph_impl,
    )
    if config.log_samples and args.log_dir is None:
        raise UserError("--reweight-log-samples writes to metrics.jsonl: add --log-dir DIR.")
    if config.enabled:
        _check_reweighting(args)
        check_scope(config, args)
        # A batch size that ramps up starts with the smallest set.
        batch_size = (args.rampup_batch_size or [args.global_batch_size])[0]
        warning = check_set_size(
            config.scope, args.micro_batch_size, args.data_parallel_size, int(batch_size)
        )
        if warning is not None:
            print_rank_0(f"WARNING: {warning}")


def _check_required(args: Namespace) -> None:
    needed = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "seq_length",
        "max_position_embeddings",
        "micro_batch_size",
    )
    # A checkpoint's arguments may supply the shape.
    if args.use_checkpoint_args or args.heterogeneous_layers_config_path is not None:
        return
    missing = ["--" + name.replace("_", "-") for name in needed if getattr(args, name) is None]
    if missing:
        raise UserError(f"required: {', '.join(missing)}.")
    if not args.train_iters and not args.train_samples and not args.skip_train:
        raise UserError("nothing to train for: give --train-iters or --train-samples.")


def _check_world_size(args: Namespace) -> None:
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


def _check_batch_size(args: Namespace) -> None:
    replicas = args.world_size // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    per_pass = args.micro_batch_size * replicas
    if args.global_batch_size is not None and args.global_batch_size % per_pass:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of "
            f"--micro-batch-size {args.micro_batch_size} x {replicas} data-parallel replicas "
            f"= {per_pass}."
        )


def _check_warmup(args: Namespace) -> None:
    """Megatron asserts this without a word, after it has built the model."""
    for warmup, total, unit in (
        (args.lr_warmup_iters, args.lr_decay_iters or args.train_iters, "iters"),
        (args.lr_warmup_samples, args.lr_decay_samples or args.train_samples, "samples"),
    ):
        if warmup and total and warmup >= total:
            raise UserError(
                f"--lr-warmup-{unit} {warmup} must be below --lr-decay-{unit} (or else "
                f"--train-{unit}), which is {total}."
            )


def _check_cpu(args: Namespace) -> None:
    if args.transformer_impl != "local":
        raise UserError(
            f"--transformer-impl {args.transformer_impl} needs a GPU: drop it to run on the CPU."
        )
    for name in ("fp8", "fp4"):
        if getattr(args, name):
            raise UserError(f"--{name}-format needs a GPU: drop it to run on the CPU.")
    if args.distributed_backend == "nccl":
        raise UserError("--distributed-backend nccl needs GPUs: drop it to run on the CPU.")
    if args.sequence_parallel:
        raise UserError(
            "--sequence-parallel needs the norms of Transformer Engine or apex; Megatron's plain-"
            "torch ones refuse it. Drop it to run on the CPU."
        )
    if args.context_parallel_size > 1:
        raise UserError(
            "--context-parallel-size above 1 needs Transformer Engine's attention: drop it to run "
            "on the CPU."
        )


def _check_reweighting(args: Namespace) -> None:
    unsupported = {
        "fp16_lm_cross_entropy": "rounds the losses to 16 bits, which quantises the weights",
        "sft": "packs conversations into one sequence, which has no loss per sample here",
        "perform_rl_step": "brings a loss of its own",
        "hybrid_context_parallel": "cuts samples into parts of varying size",
    }
    for name, why in unsupported.items():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} {why}: drop it, or --reweight-strategy.")
    if args.logits_load_dir is not None:
        raise UserError(
            "--logits-load-dir brings a distillation loss of its own: drop it, or "
            "--reweight-strategy."
        )
    if args.gtp_weight_remat_size > 1:
        raise UserError(
            "--tensor-parallel-num-weight-shards spreads the batch over a further group that the "
            "sample weights do not cover: drop it, or --reweight-strategy."
        )
    if (
        args.dataloader_inter_document_masking
        and args.context_parallel_size > 1
        and args.micro_batch_size > 1
    ):
        raise UserError(
            "--dataloader-inter-document-masking with context parallelism joins the samples of a "
            "micro-batch before cutting them: use --micro-batch-size 1 with --reweight-strategy."
        )
