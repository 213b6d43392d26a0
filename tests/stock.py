"""A Megatron script without this project: stock dataset, stock loss. The reference for `none`.

The loss is the one that megatron-core documents at `forward_step` in schedules.py:
the masked sum of the token losses, the token count, and both as the report.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch


def ready() -> None:
    """What any script on the released wheel needs: the CPU platform, and no Makefile run."""
    from megatron_rw.platform import cpu

    cpu.activate(asked_for=True)
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def _loss(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    losses, mask = output.view(-1).float(), loss_mask.view(-1).float()
    loss, tokens = torch.sum(losses * mask), mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def _forward_step(iterator: Any, model: Any) -> tuple[Any, ...]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, functools.partial(_loss, batch["loss_mask"])


def _datasets(sizes: Any, vp_stage: int | None = None) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.training import get_args, get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=get_blend_and_blend_per_split(args)[0],
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def main(change: Callable[[Any, Namespace], Any] = lambda forward_step, args: forward_step) -> None:
    """Data and expert parallelism only: every rank reads its own batches."""
    ready()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    _datasets.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        _datasets,
        ModelType.encoder_or_decoder,
        change(_forward_step, args),
    )
