"""Reads a micro-batch: broadcast over tensor parallelism, and cut over context parallelism."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_hybrid_data_context_parallel_groups
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_tokenizer
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training.datasets import DOMAIN_KEY, PLACE_KEY, has_mtp
from megatron_rw.training.token_values import REFERENCE_KEY, WEIGHTS_KEY

# What the dataset gives for a micro-batch, apart from domains and places.
_MODEL_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_PACKING_KEYS = (
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the model and the loss take it; None where this stage has no use for it."""

    tokens: Tensor | None = None  # `[b, s/cp]` int64.
    labels: Tensor | None = None  # `[b, s/cp]` int64.
    loss_mask: Tensor | None = None  # `[b, s/cp]` fp32.
    position_ids: Tensor | None = None  # `[b, s/cp]` int64.
    attention_mask: Tensor | None = None  # `[b, 1, s, s]` bool.
    packed: PackedSeqParams | None = None  # Boundaries of packed sequences; `b` is 1 then.
    domain: Tensor | None = None  # `[samples]` int64, on the stage that has the loss.
    # Of every label, on the stage that has the loss and where the settings ask for it, in the shape
    # of the labels: the static weight of its document, fp32; the stored loss of a reference, fp32,
    # NaN where there is none; the number of its document within its sequence, int64, from 0.
    sample_weights: Tensor | None = None
    reference: Tensor | None = None
    documents: Tensor | None = None
    # As in `resilience.step_samples.Note`, on the rank that drew the micro-batch.
    places: Tensor | None = None


class BatchReader:
    """Draws micro-batches in the current parallel layout.

    The domain labels are broadcast only where there is more than one domain.
    """

    def __init__(
        self, args: Namespace, num_domains: int, reweight: ReweightConfig | None = None
    ) -> None:
        self._args = args
        self._config = core_transformer_config_from_args(args)
        self._with_domains = num_domains > 1
        self._packed = args.sft or args.dataloader_inter_document_masking
        reweight = reweight or ReweightConfig()
        wanted = {WEIGHTS_KEY: reweight.sample_weights, REFERENCE_KEY: reweight.reference_scores}
        self._value_keys = [key for key, given in wanted.items() if given]
        self._with_documents = reweight.unit == "document"

    def __call__(
        self, data_iterator: Iterator[dict[str, Any]], vp_stage: int | None, training: bool
    ) -> Batch:
        """Draws the next micro-batch. Collective over the tensor-parallel group.

        Only tensor-parallel rank 0 reads the iterator, and checks the token ids. An evaluation may
        use another micro-batch size than training.
        """
        args = self._args
        at_edge = is_first_or_last_pipeline_stage(vp_stage)
        with_mtp = has_mtp(self._config, vp_stage)
        if not (at_edge or with_mtp or self._packed):
            return Batch()

        micro_batch_size = args.micro_batch_size if training else args.eval_micro_batch_size
        drawn: dict[str, Any] = {}
        if mpu.get_tensor_model_parallel_rank() == 0:
            drawn = next(data_iterator)
            self._check_ids(drawn)
        has_loss = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        domain = None
        if has_loss and self._with_domains:
            domain = self._shared(drawn.get(DOMAIN_KEY), (micro_batch_size,), torch.long)
        keys = (*_MODEL_KEYS, *_PACKING_KEYS)
        batch = get_batch_on_this_tp_rank(
            {key: _on_device(drawn.get(key)) for key in keys} if drawn else {},
            broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
            broadcast_group=mpu.get_tensor_model_parallel_group(),
            has_cu_seqlens=self._packed,
            is_hybrid_cp=args.hybrid_context_parallel,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            cp_size=args.context_parallel_size,
            tp_rank=mpu.get_tensor_model_parallel_rank(),
            micro_batch_size=micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=with_mtp,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
            is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        )
        values = self._label_values(drawn, batch["labels"]) if has_loss and training else {}
        batch = flatten_batch_for_packed_sequences(batch)
        batch |= {key: value.view_as(batch["labels"]) for key, value in values.items()}
        if not (at_edge or with_mtp):
            return Batch(packed=self._packed_params(batch))
        batch = get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=args.hybrid_context_parallel,
            cp_group=mpu.get_context_parallel_group(),
            hybrid_cp_group_func=get_hybrid_data_context_parallel_groups,
            use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
        )
        return Batch(
            **{key: batch[key] for key in _MODEL_KEYS},
            packed=self._packed_params(batch),
            **{key: batch[key] for key in values},
            domain=domain,
            places=drawn.get(PLACE_KEY),
        )

    def _check_ids(self, drawn: dict[str, Any]) -> None:
        # The tensors are still on the host, so this does not wait for the device. Later, an id that
        # is too large is a device assertion or, with tensor parallelism, silently embedded as zero.
        largest = int(drawn["tokens"].max())
        if largest >= self._args.padded_vocab_size:
            raise UserError(
                f"a sample holds token id {largest}, but the model's vocabulary has "
                f"{self._args.padded_vocab_size} entries: the data was made with another "
                "tokenizer than --tokenizer-model"
            )

    def _label_values(self, drawn: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
        """Returns what the settings ask for of every label, by field of `Batch`. Collective."""
        values = {
            key: self._shared(drawn.get(key), tuple(labels.shape), torch.float)
            for key in self._value_keys
        }
        if self._with_documents:
            ends = labels == get_tokenizer().eod
            values["documents"] = ends.cumsum(dim=1) - ends.long()
        return values

    def _shared(self, drawn: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns what tensor-parallel rank 0 has drawn, on its whole group. Collective."""
        device = torch.cuda.current_device()
        if drawn is not None:
            values = drawn.to(device, non_blocking=True)
        else:
            values = torch.empty(shape, dtype=dtype, device=device)
        if self._args.tensor_model_parallel_size > 1:
            dist.broadcast(
                values,
                mpu.get_tensor_model_parallel_src_rank(),
                group=mpu.get_tensor_model_parallel_group(),
            )
        return values

    def _packed_params(self, batch: dict[str, Any]) -> PackedSeqParams | None:
        if batch["cu_seqlens"] is None:
            return None
        # The batch keeps a leading dimension of 1; the attention kernels want 1-D.
        boundaries = batch["cu_seqlens"].squeeze(0)
        padded = batch["cu_seqlens_padded"]
        padded = padded.squeeze(0) if padded is not None else None
        update_seqlen_stats_from_cu_seqlens(boundaries)
        used = padded if padded is not None else boundaries
        longest = int(batch["max_seqlen"].item())
        local_cp_size = batch["local_cp_size"]
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=used,
            cu_seqlens_kv=used,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            local_cp_size=int(local_cp_size.item()) if local_cp_size is not None else None,
            cp_group=batch["hybrid_cp_group"],
            tokens_per_sample=self._args.seq_length,
        )


def _on_device(value: Any) -> Any:
    return value.cuda(non_blocking=True) if isinstance(value, Tensor) else value
