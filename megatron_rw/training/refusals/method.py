"""Refusals of the method's settings (kernels, scopes, sets) and of those for bad numbers."""

from argparse import Namespace

import torch
from megatron.training.utils import print_rank_0

from megatron_rw.errors import UserError
from megatron_rw.integrations.gradients import check_comparison
from megatron_rw.integrations.output_layer import CONFLICTS, plan_of
from megatron_rw.integrations.step import check_scope, check_set_size
from megatron_rw.kernels.options import BackendError
from megatron_rw.kernels.selection import default_backend, use_backend
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.reweighting.config import flag as method_flag
from megatron_rw.training.refusals.base import refuse_flags
from megatron_rw.training.settings import KernelConfig, Settings

_DROP = "drop it, or --fused-linear-cross-entropy"
# Flags whose losses are not losses of single samples, or that the weights do not reach.
_REWEIGHTING = {
    "fp16_lm_cross_entropy": "rounds the losses to 16 bits, which quantises the weights",
    "sft": "packs conversations into one sequence, which has no loss per sample here",
    "perform_rl_step": "brings a loss of its own",
    "hybrid_context_parallel": "cuts samples into parts of varying size",
    "logits_load_dir": "brings a distillation loss of its own",
    "gtp_weight_remat_size": "spreads the batch over a further group that the sample weights do "
    "not cover",
}


def check_backend(settings: Settings) -> None:
    """Chooses the kernels; refuses unknown ones, and ones that would not be used."""
    chosen = settings.kernels.reweight_kernels
    if chosen != "auto":
        if not settings.uses_kernels:
            raise UserError(
                f"--reweight-kernels {chosen} has nothing to act on: add --reweight-strategy, "
                "--fused-linear-cross-entropy, --log-logit-scale or --cross-entropy-impl fused, or "
                "drop the flag."
            )
        use_backend(chosen)
    try:
        default_backend(torch.device(settings.device))
    except BackendError as error:
        # The environment of this host alone may be wrong.
        raise UserError(str(error), known_to_all=False) from error


def check_kernels(args: Namespace, kernels: KernelConfig) -> None:
    """Checks the implementations of the loss against each other and the model."""
    fused, budget = kernels.cross_entropy_impl == "fused", kernels.logits_budget
    if fused and args.cross_entropy_loss_fusion:
        raise UserError(
            "--cross-entropy-impl fused takes the place of what --cross-entropy-loss-fusion "
            "chooses: drop one of the two."
        )
    if budget is None:
        return
    refuse_flags(args, CONFLICTS, _DROP)
    if not args.mtp_num_layers:
        why = "needs all logits at once, which there never are"
        refuse_flags(args, {"cross_entropy_loss_fusion": why}, _DROP)
        if fused:
            raise UserError(f"--cross-entropy-impl fused {why}: {_DROP}.")
    plan_of(args, budget)


def check_reweighting(args: Namespace, config: ReweightConfig, log_dir: str | None) -> None:
    """Refuses what has no loss per sample, or what a scope cannot keep exact."""
    for name, file in (("log_samples", "metrics.jsonl"), ("dump_samples", "samples.jsonl")):
        if getattr(config, name) and log_dir is None:
            raise UserError(f"{method_flag(name)} writes to {file}: add --log-dir DIR.")
    if not config.enabled:
        return
    refuse_flags(args, _REWEIGHTING, "drop it, or --reweight-strategy")
    if (
        args.dataloader_inter_document_masking
        and args.context_parallel_size > 1
        and args.micro_batch_size > 1
    ):
        raise UserError(
            "--dataloader-inter-document-masking with context parallelism joins the samples of a "
            "micro-batch before cutting them: use --micro-batch-size 1 with --reweight-strategy."
        )
    if config.unit == "document":
        why = {"allow_ambiguous_pad_tokens": "may mask the token that ends a document"}
        refuse_flags(args, why, "drop it, or --reweight-unit document")
    check_scope(config, args)
    if config.gradient_interval:
        check_comparison(args)
    if config.unit != "sequence":
        return
    # A batch size that ramps up starts with the smallest set.
    batch_size = int((args.rampup_batch_size or [args.global_batch_size])[0])
    replicas = args.data_parallel_size
    warning = check_set_size(config.scope, args.micro_batch_size, replicas, batch_size)
    if warning is not None:
        print_rank_0(f"WARNING: {warning}")


def check_choices(settings: Settings) -> None:
    """Refuses choices of the method that lack what they act on."""
    args, config, kernels = settings.megatron, settings.reweight, settings.kernels
    ours = kernels.cross_entropy_impl == "fused" or kernels.logits_budget is not None
    if settings.wants_entropy and not ours:
        raise UserError(
            "--reweight-signal entropy is computed by our cross-entropy: add --cross-entropy-impl "
            "fused, or --fused-linear-cross-entropy."
        )
    if config.until == "decay" and args.lr_decay_style != "WSD":
        raise UserError(
            f"--reweight-until decay is for a rate that is constant first: add --lr-decay-style "
            f"WSD (it is {args.lr_decay_style}), or give the iteration."
        )
    cut = config.unit != "sequence" or args.dataloader_inter_document_masking
    if config.dump_samples and cut and args.context_parallel_size > 1:
        raise UserError(
            "--reweight-dump-samples and context parallelism cannot tell where a unit is from with "
            "--reweight-unit document and token and --dataloader-inter-document-masking: drop one."
        )


def check_bad_numbers(settings: Settings) -> None:
    """Refuses what contradicts --on-nonfinite and --loss-spike-factor, or would do nothing."""
    args, policy = settings.megatron, settings.nonfinite.on_nonfinite
    if policy != "raise" and not args.check_for_nan_in_loss_and_grad:
        raise UserError(
            f"--on-nonfinite {policy} without Megatron's check does nothing: drop it, or "
            "--no-check-for-nan-in-loss-and-grad (or --fp16 with its dynamic loss scale, which "
            "turns the check off and skips such steps itself)."
        )
    if policy != "raise" and args.use_megatron_fsdp:
        raise UserError(
            f"--use-megatron-fsdp has a check of its own, which ends the run: drop it, or "
            f"--on-nonfinite {policy}."
        )
    if settings.nonfinite.loss_spike_factor is None:
        return
    if settings.monitoring.log_dir is None:
        raise UserError("--loss-spike-factor writes to spikes.jsonl: add --log-dir DIR.")
    if args.cuda_graph_impl == "full_iteration":
        raise UserError(
            "--cuda-graph-impl full_iteration never gives the samples' losses out of its "
            "graph: drop it, or --loss-spike-factor."
        )
