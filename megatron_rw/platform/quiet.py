"""Silences the messages of libraries that a user can do nothing about, and no others."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

from megatron_rw.platform import Device


@dataclass(frozen=True)
class LogLine:
    """A line of a logger that is silenced: how it begins, and why nobody needs it."""

    logger: str
    begins: str
    why: str

    def differs_from(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is another line, which is let through."""
        return not record.getMessage().startswith(self.begins)


_LOG_LINES = (
    LogLine(
        "megatron.core.models.gpt.gpt_model",
        "GPTModel IS DEPRECATED",
        "pretrain_gpt.py builds that model; the choice is not the user's",
    ),
    LogLine(
        "megatron.core.rerun_state_machine",
        "Setting RerunStateMachine mode",
        "it is logged twice around every evaluation",
    ),
    LogLine(
        "megatron.core.rerun_state_machine",
        "RerunStateMachine initialized",
        "the default, announced as a warning",
    ),
    LogLine(
        "megatron.core.rerun_state_machine",
        "Result validation enabled",
        "the default, announced as a warning",
    ),
)
_CPU_LOG_LINES = (
    LogLine(
        "megatron.core.tensor_parallel.random",
        "CPU RNG state changed within GPU RNG context",
        "the two are one generator on this platform, on purpose",
    ),
    LogLine(
        "torch.utils.cpp_extension",
        "No CUDA runtime is found",
        "the platform was chosen because of that",
    ),
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
    for line in _LOG_LINES + (_CPU_LOG_LINES if on_cpu else ()):
        logging.getLogger(line.logger).addFilter(line.differs_from)
