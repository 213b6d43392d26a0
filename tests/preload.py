"""Imported once by the fork server: every rank of every test run starts from here in no time."""

from megatron_rw.platform import cpu

cpu.activate(asked_for=True)

import megatron.training.inprocess_restart  # noqa: E402, F401

import pretrain_gpt_rw  # noqa: E402, F401
