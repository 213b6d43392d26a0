"""Library messages that a user can do nothing about; only those are silenced."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

from megatron_rw.platform import Device


@dataclass(frozen=True)
class LogLine:
    """A line of a logger, by how it begins, and why nobody needs it."""

    logger: str
    begins: str
    why: str

    def differs_from(self, record: logging.LogRecord) -> bool:
        """Whether the record is another line, which is let through."""
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
        "twice around every evaluation",
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
    # pretrain_gpt.py's own default gives way to the flag; that is what a default is.
    r"Overriding default arguments for tokenizer_type",
    # Imported by Megatron's optimizer, whatever the model is.
    r"MimoModelConfig is experimental",
)
_CPU_WARNINGS = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"Only transformer-engine>=[0-9.]+ supports MoE experts",
    r"'pin_memory' argument is set as true but no accelerator is found",
)


def silence(device: Device) -> None:
    """Filter the messages that do not apply on a device.

    Args:
        device: in use.
    """
    on_cpu = device == "cpu"
    for message in _WARNINGS + (_CPU_WARNINGS if on_cpu else ()):
        warnings.filterwarnings("ignore", message=message)
    for line in _LOG_LINES + (_CPU_LOG_LINES if on_cpu else ()):
        logging.getLogger(line.logger).addFilter(line.differs_from)
