"""Megatron's command line with our flags added, and its refusals in one line."""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import io
import os
import sys
import traceback
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron import core
from megatron import training as megatron_training
from megatron.training import global_vars
from megatron.training.argument_utils import (
    ArgumentGroupFactory,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.arguments import parse_args as megatron_parse_args
from megatron.training.utils import print_rank_0

from megatron_rw import patching
from megatron_rw.errors import UserError
from megatron_rw.integrations.output_layer import plan_of
from megatron_rw.kernels.selection import default_backend
from megatron_rw.patching import Patch
from megatron_rw.platform import Device, allow_argument_files
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training import refusals
from megatron_rw.training.settings import CONFIGS, REWEIGHT_PREFIX, Settings

# Folders of the code that refuses flags, and of ours.
_MEGATRON = tuple(os.path.dirname(str(package.__file__)) for package in (core, megatron_training))
_OURS = str(Path(__file__).parents[1])
# Settings of the local transformer implementation that hold where a module is missing.
_WITHOUT_MODULE: dict[str, dict[str, object]] = {
    "apex": {"no_persist_layer_norm": True},
    "fused_weight_gradient_mlp_cuda": {"gradient_accumulation_fusion": False},
    "scaled_upper_triang_masked_softmax_cuda": {"masked_softmax_fusion": False},
}


def parse_args(device: Device) -> Settings:
    """Parses, checks and validates the command line, and sets Megatron's globals.

    Does what Megatron's `parse_and_validate_args` does, with our checks before and after it. What
    either refuses is a `UserError`.
    """
    add = functools.partial(add_arguments, device=device)
    with megatron_refusals():
        refusals.check_parsed(Settings.of(megatron_parse_args(add), device))
        args: Namespace = parse_and_validate_args(
            add, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
        )
    settings = Settings.of(args, device)
    refusals.check_validated(settings)
    return settings


def parse_job_flags(flags: Sequence[str], device: Device) -> Settings:
    """Parses the flags of a job as `parse_args` does, for a tool that takes them beside its own.

    The job's logs are not set up, and Megatron's list of all arguments is not printed.
    """
    why = "Megatron sets up the job's logs while it parses, and a tool must not write to them."
    writers = ("_set_tensorboard_writer", "_set_wandb_writer", "_set_one_logger")
    patching.apply([Patch(global_vars, name, lambda args: None, why) for name in writers])
    sys.argv = [sys.argv[0], *flags]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return parse_args(device)
    finally:
        for line in said.getvalue().splitlines():
            if line.startswith(("WARNING", "> ")):
                print(line, flush=True)


def megatron_config(args: Namespace) -> Any:
    """Returns the typed configuration that Megatron makes of its validated arguments."""
    with megatron_refusals():
        return pretrain_cfg_container_from_args(args, gpt_config_from_args(args))


@contextlib.contextmanager
def megatron_refusals() -> Iterator[None]:
    """Turns what Megatron raises about flags, while they are parsed, into a `UserError`.

    It is recognised by where it is raised: in Megatron, or in a library that Megatron calls. What
    our own code raises is a bug, and passes. An assertion without a text is told by its condition.
    """
    try:
        yield
    except (AssertionError, ValueError, OSError) as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        frame = next((f for f in frames if f.filename.startswith((*_MEGATRON, _OURS))), None)
        if frame is None or frame.filename.startswith(_OURS):
            raise
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        text = f"Megatron refuses the arguments: {str(error) or frame.line} ({where})"
        raise UserError(text) from error


def add_arguments(parser: ArgumentParser, device: Device) -> ArgumentParser:
    """Adds our groups of arguments to Megatron's, and sets defaults that fit the device."""
    # Annotations are strings under `from __future__`; the factory wants the types themselves.
    for config in (*CONFIGS, ReweightConfig):
        resolve_annotations(config)
    for config in CONFIGS:
        ArgumentGroupFactory(config).build_group(parser, "megatron_rw")
    _PrefixedGroupFactory(ReweightConfig, REWEIGHT_PREFIX).build_group(parser, "sample reweighting")
    parser.set_defaults(**default_arguments(device))
    allow_argument_files(parser)
    _repair_help(parser)
    # argparse would print a usage of some thousand lines on every rank.
    parser.error = functools.partial(_parser_error, parser)  # type: ignore[method-assign]
    return parser


class _PrefixedGroupFactory(ArgumentGroupFactory):
    """Puts a prefix before flags and destinations: `strategy` becomes `reweight_strategy`."""

    def __init__(self, config: type, prefix: str) -> None:
        super().__init__(config)
        self._prefix = prefix

    def _build_argparse_kwargs_from_field(
        self, attribute: dataclasses.Field[Any]
    ) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._build_argparse_kwargs_from_field(attribute)
        name = f"{self._prefix}_{attribute.name}"
        kwargs["arg_names"] = ["--" + name.replace("_", "-")]
        kwargs["dest"] = name
        return kwargs


def default_arguments(device: Device) -> dict[str, object]:
    """Returns the defaults, by destination, that the device and the installed packages need.

    On CUDA with Transformer Engine only NVIDIA's internal tracker is turned off where it is not
    installed: Megatron would warn that it is missing.
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


def announce(settings: Settings, domain_names: Sequence[str]) -> None:
    """Prints what is in use: device, optional packages, domains, kernels and the method."""
    parts = ", ".join(
        f"{name} {'in use' if _installed(module) else 'not installed'}"
        for name, module in (("Transformer Engine", "transformer_engine"), ("apex", "apex"))
    )
    where = "CUDA" if settings.device == "cuda" else "the CPU, over gloo"
    print_rank_0(f"> megatron_rw on {where}; {parts}; domains: {', '.join(domain_names)}")
    args, kernels, config = settings.megatron, settings.kernels, settings.reweight
    backend = default_backend(torch.device(settings.device))
    if kernels.logits_budget is not None:
        plan = plan_of(args, kernels.logits_budget)
        line = f"> output layer fused with its cross-entropy: {plan}"
        if plan.splits == 1:
            line += "; as all fit, --cross-entropy-impl fused alone takes one matrix product fewer"
        print_rank_0(line)
        heads = f"; multi-token prediction: {kernels.cross_entropy_impl}"
        print_rank_0(f"> kernels: {backend}{heads if args.mtp_num_layers else ''}")
    else:
        print_rank_0(f"> cross-entropy: {kernels.cross_entropy_impl}; kernels: {backend}")
    values = "off (--reweight-strategy none)"
    if config.enabled:
        always = ("strategy", "delta", "temperature", "scope")
        values = ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(config, field.name)}"
            for field in dataclasses.fields(config)
            if field.name in always or getattr(config, field.name) != field.default
        )
    print_rank_0(f"> sample reweighting: {values}")


def _repair_help(parser: ArgumentParser) -> None:
    """Lets --help print although a text of Megatron 0.19.2 has "10%)", a broken format."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help:
            try:
                formatter._expand_help(action)
            except (ValueError, TypeError):
                action.help = action.help.replace("%", "%%")


def _parser_error(parser: ArgumentParser, message: str) -> NoReturn:
    """Raises argparse's error as a `UserError`, and suggests flags of a similar name."""
    known = [option for action in parser._actions for option in action.option_strings]
    unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
    if message.startswith("unrecognized arguments") and unknown:
        close = difflib.get_close_matches(unknown[0], known, n=3)
        message += f". Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{message} (pretrain_gpt_rw.py --help lists all flags)")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def resolve_annotations(config: type) -> None:
    """Replaces the annotations of a dataclass, which are strings, by the types that they name."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        field.type = hints[field.name]
