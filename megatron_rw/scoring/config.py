"""The flags of scoring, those of the model, and what of both decides the scores."""

from __future__ import annotations

import argparse
import importlib.util
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron.core.datasets.utils import get_blend_from_list

from megatron_rw.data.indexed.domains import FILE_NAME, DomainsFile, domain_names
from megatron_rw.errors import UserError
from megatron_rw.platform import Device
from megatron_rw.platform.argfile import allow_argument_files
from megatron_rw.resilience.folder import CheckpointFolder
from megatron_rw.resilience.resuming import SHAPING
from megatron_rw.scoring.plan import Plan, row_lengths
from megatron_rw.training.refusals.data import data_prefixes
from megatron_rw.training.settings import Settings
from megatron_rw.training.tool_arguments import ToolParser, parse_job_flags

VERSION = 1
DEFINITION = (
    "token_losses[i] = -ln p(token i of the .bin | the tokens before it in its document, as many "
    "as its row holds), nats; NaN for the first token of a document"
)

# Flags of a job that are about its steps, its data's order or its checkpoints: taken and dropped.
_DROPPED = {
    "--save": 1,
    "--save-interval": 1,
    "--async-save": 0,
    "--global-batch-size": 1,
    "--rampup-batch-size": 3,
    "--split": 1,
}
_FORCED = (
    "--skip-train --eval-iters 0 --no-load-optim --no-load-rng --exit-on-missing-checkpoint "
    "--no-create-attention-mask-in-dataloader --reweight-strategy none --split 1"
).split()
# What does not change a row's shape and still the last bits of its losses.
_PRECISION = (
    *("bf16", "fp16", "fp8", "fp4", "transformer_impl", "attention_backend"),
    *("tensor_model_parallel_size", "fused_linear_cross_entropy"),
)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What scoring itself is told.

    Attributes:
        score_dir: where the arrays go.
        stride: from one row of a long document to the next; None for the row's length.
        block_tokens: about how many tokens are scored, written and recorded together.
        picture: where a picture of the histograms goes.
    """

    score_dir: str
    stride: int | None
    block_tokens: int
    picture: Path | None


def split_flags(argv: Sequence[str], description: str) -> tuple[ScoreConfig, list[str]]:
    """Take the flags of scoring from a command line.

    Args:
        argv: without the program's name.
        description: for --help.

    Returns:
        They, and the flags that Megatron is to parse.

    Raises:
        UserError: one is missing or cannot be.
    """
    parser = ToolParser(
        prog="score_dataset.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--load", metavar="DIR", help="the checkpoint's folder; see --ckpt-step")
    parser.add_argument(
        "--data-path",
        nargs="+",
        metavar="PATH",
        help="datasets, as prefixes of .bin and .idx or as folders with a domains.json; weights "
        "between them are ignored",
    )
    parser.add_argument("--score-dir", metavar="DIR", help="folder for the arrays")
    parser.add_argument(
        "--score-stride",
        type=int,
        metavar="N",
        help="tokens from one row of a long document to the next; what is left of --seq-length is "
        "context that the first losses of a row have (--seq-length: none)",
    )
    parser.add_argument(
        "--block-tokens",
        type=int,
        default=1 << 22,
        metavar="N",
        help="tokens that are scored, written and recorded together (4194304): what a killed run "
        "computes again. Give some 20 x --seq-length x --micro-batch-size for each data-parallel "
        "rank; with less, ranks wait for each other",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw the histograms (needs matplotlib)"
    )
    for flag, values in _DROPPED.items():
        if values:
            parser.add_argument(flag, nargs=values, help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    allow_argument_files(parser)
    own, flags = parser.parse_known_args(argv)
    for name, what in (("load", "the folder of the checkpoint"), ("score_dir", "where to write")):
        if getattr(own, name) is None:
            raise UserError(f"--{name.replace('_', '-')} DIR is missing: {what}.")
    for name in ("score_stride", "block_tokens"):
        value = getattr(own, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    if own.picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--picture needs a package that is not installed: pip install matplotlib")
    flags += ["--load", own.load, *_FORCED]
    if own.data_path is not None:
        flags += ["--data-path", *expanded(own.data_path)]
    config = ScoreConfig(
        score_dir=own.score_dir,
        stride=own.score_stride,
        block_tokens=own.block_tokens,
        picture=own.picture,
    )
    return config, flags


def expanded(paths: Sequence[str]) -> list[str]:
    """The dataset prefixes of a `--data-path`: without weights, folders by their domains.json.

    Raises:
        UserError: a folder has none, or a malformed one.
    """
    prefixes, _ = get_blend_from_list(list(paths))
    return [p for prefix in prefixes for p in _expanded(prefix)]


def _expanded(prefix: str) -> Iterable[str]:
    if not os.path.isdir(prefix):
        return [prefix]
    path = os.path.join(prefix, FILE_NAME)
    if not os.path.isfile(path):
        raise UserError(
            f"--data-path {prefix}: a folder without a {FILE_NAME}; give the prefixes of its .bin "
            "and .idx files."
        )
    records = DomainsFile.load(path).domains.values()
    return [os.path.join(prefix, record.prefix) for record in records]


def scoring_arguments(config: ScoreConfig, flags: Sequence[str], device: Device) -> Settings:
    """The settings of the job, after all checks that a run makes of them.

    Args:
        config: of scoring.
        flags: the others.
        device: what `platform.select_device` chose.

    Raises:
        UserError: For what a run or scoring refuses.
    """
    settings = parse_job_flags(flags, device)
    args = settings.megatron
    _check(args)
    if config.stride is not None and config.stride > args.seq_length:
        raise UserError(
            f"--score-stride {config.stride} would leave tokens out: give at most --seq-length, "
            f"{args.seq_length}."
        )
    # A row is of one document as it is.
    args.dataloader_inter_document_masking = False
    return settings


def _check(args: Namespace) -> None:
    unsupported = {
        "mock_data": "has no dataset to score",
        "sft": "reads conversations and not .bin and .idx files",
        "use_megatron_fsdp": "was not tried with scoring",
        "use_torch_fsdp2": "was not tried with scoring",
        "hybrid_context_parallel": "cuts rows",
        "perform_rl_step": "brings a loss of its own",
        "logits_load_dir": "brings a loss of its own",
        "fp16_lm_cross_entropy": "rounds the losses to 16 bits",
    }
    for name, why in unsupported.items():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} {why}: drop it.")
    if args.context_parallel_size > 1:
        raise UserError(
            "--context-parallel-size above 1 cuts rows, whose losses are not put together again: "
            "drop it, scoring keeps no activations."
        )
    if args.gtp_weight_remat_size > 1:
        raise UserError("--tensor-parallel-num-weight-shards was not tried here: drop it.")
    if args.cuda_graph_impl != "none":
        raise UserError("--cuda-graph-impl wants one shape, and rows have several: drop it.")


def plan_of(config: ScoreConfig, args: Namespace) -> Plan:
    """How the datasets are cut, by the flags alone.

    Args:
        config: of scoring.
        args: validated.
    """
    # Ranks that exchange tokens of experts have to go through the same shapes in step.
    one_shape = args.expert_model_parallel_size > 1 or args.tp_comm_overlap
    lengths = row_lengths(args.seq_length, args.tensor_model_parallel_size)
    return Plan(
        seq_length=args.seq_length,
        stride=config.stride or args.seq_length,
        micro_batch_size=args.eval_micro_batch_size,
        row_lengths=lengths[:1] if one_shape else lengths,
        block_tokens=config.block_tokens,
    )


def describe(args: Namespace, plan: Plan) -> dict[str, Any]:
    """All that decides the scores, as `scores.json` has it. On the rank that looked at the data.

    Args:
        args: validated, with `data_fingerprints`.
        plan: how the datasets are cut.

    Raises:
        UserError: two datasets have the same file name.
        UserError: a dataset cannot be read.
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
        blocks = plan.blocks(prefix)
        datasets[name] = {
            "path": prefix,
            "domain": domain,
            "fingerprint": args.data_fingerprints[prefix],
            "documents": blocks.documents,
            "tokens": blocks.tokens,
        }
    return {
        "version": VERSION,
        "definition": DEFINITION,
        "checkpoint": {"path": os.path.abspath(args.load), "iteration": _iteration(args)},
        "model": {name: _plain(getattr(args, name)) for name in SHAPING},
        "precision": {name: _plain(getattr(args, name)) for name in _PRECISION},
        "rows": {
            "seq_length": plan.seq_length,
            "stride": plan.stride,
            "micro_batch_size": plan.micro_batch_size,
            "lengths": list(plan.row_lengths),
            "block_tokens": plan.block_tokens,
        },
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
