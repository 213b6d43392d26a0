"""Silences the messages of libraries that a user can do nothing about, and no others."""

import functools
import logging
import warnings

from megatron_rw.platform import Device

# Loggers, and how a line begins that is silenced.
_LOG_LINES = (
    # pretrain_gpt.py builds that model; the choice is not the user's.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    # Logged twice around every evaluation.
    ("megatron.core.rerun_state_machine", "Setting RerunStateMachine mode"),
    # Defaults that are announced as warnings.
    ("megatron.core.rerun_state_machine", "RerunStateMachine initialized"),
    ("megatron.core.rerun_state_machine", "Result validation enabled"),
)
_CPU_LOG_LINES = (
    # The two are one generator on this platform, on purpose.
    ("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context"),
    # The platform was chosen because of that.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)
# Regular expressions on the text of a Python warning.
_WARNINGS = (
    # The default of pretrain_gpt.py gives way to the flag, as a default should.
    r"Overriding default arguments for tokenizer_type",
    # Megatron's optimizer imports it, whatever the model is.
    r"MimoModelConfig is experimental",
)
_CPU_WARNINGS = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"Only transformer-engine>=[0-9.]+ supports MoE experts",
    r"'pin_memory' argument is set as true but no accelerator is found",
)


def silence(device: Device) -> None:
    """Filters the messages that do not apply on the device in use."""
    on_cpu = device == "cpu"
    for message in _WARNINGS + (_CPU_WARNINGS if on_cpu else ()):
        warnings.filterwarnings("ignore", message=message)
    for logger, begins in _LOG_LINES + (_CPU_LOG_LINES if on_cpu else ()):
        logging.getLogger(logger).addFilter(functools.partial(_differs, begins))


def _differs(begins: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(begins)
