"""Imported once by the fork server: every rank of every test run starts from here in no time."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import inspect
import pkgutil
from typing import Any

import megatron_rw
from megatron_rw.platform import cpu

cpu.activate(asked_for=True)

import megatron.core.models.mimo  # noqa: E402
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.inprocess_restart  # noqa: E402, F401
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

import pretrain_gpt_rw  # noqa: E402, F401
from tests import mutants  # noqa: E402
from tests.sealed_queue import SealedQueue  # noqa: E402

# What the program imports as it runs; of the kernels, what it imports on a CPU.
for module in pkgutil.walk_packages(megatron_rw.__path__, "megatron_rw."):
    if not module.name.startswith("megatron_rw.kernels.cuda_"):
        importlib.import_module(module.name)

# Megatron reads the help texts of its flags from its sources, for each parser anew.
inspect.getsource = functools.cache(inspect.getsource)  # type: ignore[assignment]
add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

_results_queue = filesystem_async.get_write_results_queue


def _sealed_results_queue(mp_mode: str = "spawn") -> Any:
    return SealedQueue(_results_queue(mp_mode))


filesystem_async.get_write_results_queue = _sealed_results_queue

mutants.pytest_configure()

# The ranks share these objects; a garbage collection that visits them would copy their pages.
gc.collect()
gc.freeze()
