"""Megatron's command line with our flags added, and failures as one message."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
import sys
import traceback
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_and_validate_args
from megatron.training.arguments import parse_args as megatron_parse_args
from megatron.training.utils import print_rank_0

from megatron_rw.errors import UserError
from megatron_rw.integrations.output_layer import plan_of
from megatron_rw.kernels.selection import default_backend
from megatron_rw.observability.config import DEFAULT_ADDRESS
from megatron_rw.platform import Device
from megatron_rw.platform.argfile import allow_argument_files
from megatron_rw.resilience.nonfinite import OnNonFinite
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training import checks


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the program runs, and what it writes beside Megatron's own logs."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA when a device is visible, otherwise the CPU over gloo."""

    log_dir: str | None = None
    """Write metrics.jsonl here: one object per logged step and per validation."""

    cross_entropy_impl: Literal["megatron", "fused"] = "megatron"
    """megatron: core's cross-entropy, which --cross-entropy-loss-fusion varies. fused: ours, which
    reads the logits once forward and overwrites them with their gradient backward."""

    fused_linear_cross_entropy: bool = False
    """Compute the output layer and the cross-entropy of its logits as one operation: no backward
    pass over the logits, no second buffer of their size, none at all during evaluation."""

    logits_budget_mib: int | None = None
    """MiB that --fused-linear-cross-entropy may take for the logits of a micro-batch. Where they do
    not fit, backward computes them again in parts of the vocabulary. No limit by default."""

    keep_last: int | None = None
    """How many of the newest checkpoints in --save to keep; older ones are deleted once a newer one
    is complete. All by default."""

    keep_every: int | None = None
    """Keep, beside those of --keep-last, the checkpoints whose iteration is a multiple of this."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (disk full, no permission, quota). The one
    before is untouched in either case."""

    exit_code_when_unfinished: int = 0
    """Exit status of a run that ends in good order before its last iteration: on a signal
    (--exit-signal-handler), --exit-duration-in-mins or --exit-interval. A batch script can tell by
    it whether to put the job into the queue again. Megatron's 0 by default."""

    allow_changed_data: bool = False
    """Resume although a dataset is no longer the one that the checkpoint was trained on."""

    prometheus_port: int | None = None
    """Serve the newest metrics for Prometheus at this port of the last rank's host, under /metrics;
    0 takes one that is free. The rank says where when it starts. Off by default."""

    prometheus_address: str = DEFAULT_ADDRESS
    """Address that --prometheus-port listens at. By default nothing outside the host reaches it;
    0.0.0.0 lets every machine of the network read the metrics, with no password."""

    log_slowest_rank: bool = False
    """Name the slowest rank of every logging interval, its host, and by how much its forward passes
    took longer than the median of its pipeline stage."""

    on_nonfinite: OnNonFinite = "raise"
    """What to do with a step whose loss or gradient is not finite. raise: end the run on all ranks,
    with one line that names the samples. skip-step: take no optimizer step, on any rank."""

    max_consecutive_skips: int | None = None
    """How many steps in a row --on-nonfinite may skip; the run ends at the next. 10 by default.
    Counted anew after a resume."""

    loss_spike_factor: float | None = None
    """Write the samples whose loss is not finite, or more than this many times the running mean,
    to spikes.jsonl in --log-dir. Training is unaffected. Off by default."""

    reweight_kernels: Literal["auto", "torch", "triton", "cuda"] = "auto"
    """Implementation of the fused cross-entropies and of the weighting. cuda is built with nvcc at
    first use. auto: what the environment variable MEGATRON_RW_KERNELS names, otherwise triton on a
    GPU and torch elsewhere."""


class _PrefixedGroupFactory(ArgumentGroupFactory):
    """Names flags and destinations of a dataclass with a prefix, `strategy` as `reweight_strategy`.

    Args:
        config_class: the dataclass.
        prefix: without underscore.
    """

    def __init__(self, config_class: type, prefix: str) -> None:
        super().__init__(config_class)
        self._prefix = prefix

    def _build_argparse_kwargs_from_field(
        self, attribute: dataclasses.Field[Any]
    ) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._build_argparse_kwargs_from_field(attribute)
        name = f"{self._prefix}_{attribute.name}"
        kwargs["arg_names"] = ["--" + name.replace("_", "-")]
        kwargs["dest"] = name
        return kwargs


def add_arguments(parser: ArgumentParser, device: Device) -> ArgumentParser:
    """Megatron's extra-arguments hook: our groups, and defaults that fit the device.

    Args:
        parser: holds Megatron's own arguments already.
        device: what `platform.select_device` chose.
    """
    # Annotations are strings under `from __future__`; the factory wants the types themselves.
    for config_class in (RunConfig, ReweightConfig):
        resolve_annotations(config_class)
    ArgumentGroupFactory(RunConfig).build_group(parser, "megatron_rw")
    _PrefixedGroupFactory(ReweightConfig, "reweight").build_group(parser, "sample reweighting")
    parser.set_defaults(**default_arguments(device))
    allow_argument_files(parser)
    _repair_help(parser)
    # argparse would print a usage of some thousand lines on every rank.
    parser.error = functools.partial(_parser_error, parser)  # type: ignore[method-assign]
    return parser


# What the local transformer implementation must do without where a module is missing.
_WITHOUT_MODULE: dict[str, dict[str, object]] = {
    "apex": {"no_persist_layer_norm": True},
    "fused_weight_gradient_mlp_cuda": {"gradient_accumulation_fusion": False},
    "scaled_upper_triang_masked_softmax_cuda": {"masked_softmax_fusion": False},
}


def default_arguments(device: Device) -> dict[str, object]:
    """Megatron defaults, by destination, that the device and the installed parts allow.

    On CUDA with Transformer Engine these are Megatron's own, but for the tracker that only NVIDIA
    has: Megatron looks for it unless told not to, and then warns that it is missing.
    """
    defaults: dict[str, object] = {}
    if not _installed("one_logger"):
        defaults["enable_one_logger"] = False
    if device == "cpu":
        from megatron_rw.platform import cpu

        return defaults | cpu.ARGUMENT_DEFAULTS
    if _installed("transformer_engine"):
        return defaults
    defaults |= {"transformer_impl": "local", "apply_rope_fusion": False}
    for module, setting in _WITHOUT_MODULE.items():
        if not _installed(module):
            defaults |= setting
    return defaults


def announce(
    args: Namespace, device: Device, config: ReweightConfig, domain_names: Sequence[str]
) -> None:
    """Say once what is in use: device, optional packages, domains and the method."""
    parts = ", ".join(
        f"{name} {'in use' if _installed(module) else 'not installed'}"
        for name, module in (("Transformer Engine", "transformer_engine"), ("apex", "apex"))
    )
    where = "CUDA" if device == "cuda" else "the CPU, over gloo"
    print_rank_0(f"> megatron_rw on {where}; {parts}; domains: {', '.join(domain_names)}")
    kernels = default_backend(torch.device(device))
    if args.fused_linear_cross_entropy:
        print_rank_0(f"> output layer fused with its cross-entropy: {plan_of(args)}")
        heads = f"; multi-token prediction: {args.cross_entropy_impl}"
        print_rank_0(f"> kernels: {kernels}{heads if args.mtp_num_layers else ''}")
    else:
        print_rank_0(f"> cross-entropy: {args.cross_entropy_impl}; kernels: {kernels}")
    if config.enabled:
        settings = ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(config, field.name)}"
            for field in dataclasses.fields(config)
        )
        print_rank_0(f"> sample reweighting: {settings}")
    else:
        print_rank_0("> sample reweighting: off (--reweight-strategy none)")


def parse_args(device: Device) -> Namespace:
    """Parse, check and validate the command line, and set Megatron's globals.

    Does what Megatron's `parse_and_validate_args` does, with our checks before and after it.

    Args:
        device: what `platform.select_device` chose.

    Raises:
        UserError: what our checks refuse.
        AssertionError, ValueError, OSError: what Megatron's refuse. See `one_message`.
    """
    add = functools.partial(add_arguments, device=device)
    parsed = megatron_parse_args(add)
    checks.check_kernels(parsed, reweight_config(parsed), device)
    checks.check_launch(parsed, device)
    args: Namespace = parse_and_validate_args(
        add, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    args.device = device
    checks.check_run(args, reweight_config(args))
    return args


def reweight_config(args: Namespace) -> ReweightConfig:
    """The `--reweight-*` flags as the checked record.

    Raises:
        UserError: a setting is impossible, or contradicts another.
    """
    return ReweightConfig(
        **{f.name: getattr(args, f"reweight_{f.name}") for f in dataclasses.fields(ReweightConfig)}
    )


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Turn a refusal into one line, from rank 0, and exit status 2 on every rank.

    A refusal is a `UserError`, or what Megatron raises on bad arguments: AssertionError (some
    without a text: the condition is shown instead), ValueError, OSError.
    """
    try:
        yield
    except (AssertionError, ValueError, OSError, UserError) as refusal:
        # Rank 0 speaks for all, but of what another rank alone can know.
        if int(os.environ.get("RANK", "0")) == 0 or not getattr(refusal, "known_to_all", True):
            print(f"error: {explain(refusal)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def explain(refusal: Exception) -> str:
    """A refusal in one line: its own words where they are ours, else with the place in Megatron."""
    frame = traceback.extract_tb(refusal.__traceback__)[-1]
    ours = f"{os.sep}megatron_rw{os.sep}" in frame.filename
    if isinstance(refusal, UserError) or (ours and str(refusal)):
        return str(refusal)
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return f"Megatron refuses the arguments: {str(refusal) or frame.line} ({where})"


def _repair_help(parser: ArgumentParser) -> None:
    """Let --help print: a text of Megatron 0.19.2 ends in "10%)", where argparse sees a format."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help:
            try:
                formatter._expand_help(action)
            except ValueError:
                action.help = action.help.replace("%", "%%")


def _parser_error(parser: ArgumentParser, message: str) -> NoReturn:
    """Name the flag that was probably meant, where argparse does not know one."""
    known = [option for action in parser._actions for option in action.option_strings]
    unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
    if message.startswith("unrecognized arguments") and unknown:
        close = difflib.get_close_matches(unknown[0], known, n=3)
        message += f". Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{message} (pretrain_gpt_rw.py --help lists all flags)")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def resolve_annotations(config_class: type) -> None:
    """Replace the annotations of a dataclass, which are strings, by the types they name."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        field.type = hints[field.name]
