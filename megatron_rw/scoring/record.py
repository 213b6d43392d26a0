"""What decides the scores, as `scores.json` has it. Runs whose records are equal are the same."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from enum import Enum
from typing import Any

from megatron_rw.data.indexed.domains import domain_names
from megatron_rw.errors import UserError
from megatron_rw.resilience.folder import CheckpointFolder
from megatron_rw.resilience.resuming import SHAPING
from megatron_rw.scoring.plan import Blocks, Plan
from megatron_rw.training.refusals.data import data_prefixes

_VERSION = 1
_DEFINITION = (
    "token_losses[i] = -ln p(token i of the .bin | the tokens before it in its document, as many "
    "as its row holds), nats; NaN for the first token of a document"
)
# Arguments that do not change a row's shape, but the last bits of its losses.
_PRECISION = (
    *("bf16", "fp16", "fp8", "fp4", "transformer_impl", "attention_backend"),
    *("tensor_model_parallel_size", "fused_linear_cross_entropy"),
)


def describe(args: Namespace, plan: Plan) -> dict[str, Any]:
    """Returns all that decides the scores, as JSON has it. On the rank that looked at the data.

    Args:
        args: Validated, with `data_fingerprints`.
        plan: How the datasets are cut.

    Raises:
        UserError: Two datasets have the same file name, or one cannot be read.
    """
    prefixes = [os.path.abspath(prefix) for prefix in data_prefixes(args)]
    datasets: dict[str, dict[str, Any]] = {}
    for prefix, domain in zip(prefixes, domain_names(prefixes), strict=True):
        name = os.path.basename(prefix)
        if name in datasets:
            raise UserError(
                f"--data-path {datasets[name]['path']} and {prefix} have the same file name, by "
                "which their scores are named: score one of them into another --score-dir."
            )
        blocks = Blocks(prefix, plan.block_tokens)
        datasets[name] = {
            "path": prefix,
            "domain": domain,
            "fingerprint": args.data_fingerprints[prefix],
            "documents": blocks.documents,
            "tokens": blocks.tokens,
        }
    return {
        "version": _VERSION,
        "definition": _DEFINITION,
        "checkpoint": {"path": os.path.abspath(args.load), "iteration": _iteration(args)},
        "model": {name: _plain(getattr(args, name)) for name in SHAPING},
        "precision": {name: _plain(getattr(args, name)) for name in _PRECISION},
        "rows": dataclasses.asdict(plan),
        "datasets": datasets,
    }


def _iteration(args: Namespace) -> int | str | None:
    if "://" in args.load:
        return int(args.ckpt_step) if args.ckpt_step else None
    folder = CheckpointFolder(args.load)
    return "release" if folder.is_release() else args.ckpt_step or folder.tracked()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    return value if isinstance(value, str | int | float | None) else str(value)
