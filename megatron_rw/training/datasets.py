"""Megatron's GPT datasets, each sample labelled with its domain."""

import dataclasses
import functools
import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_rw.data.indexed.domains import domain_names
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training.token_values import TokenValues

DOMAIN_KEY = "domain"
PLACE_KEY = "place"

# The arguments of those fields of GPTDatasetConfig that have another name than their argument.
_RENAMED = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "inter_document_masking": "dataloader_inter_document_masking",
}
_FIM_TOKENS = ("prefix", "middle", "suffix", "pad", "eod")


class DomainLabelled(torch.utils.data.Dataset[dict[str, Any]]):
    """A Megatron dataset whose samples also hold their domain and their place in the data.

    The domains are given by member of a blend, whose samples hold a `dataset_id`. A single dataset
    counts as one member. Of several validation sets, places count members from `first_member`.
    """

    def __init__(
        self, dataset: Any, domain_of_member: Sequence[int], first_member: int = 0
    ) -> None:
        self.first_member = first_member
        self.dataset = dataset
        self.domain_of_member = tuple(domain_of_member)
        # Of the training dataset, where the settings ask for it.
        self.token_values: TokenValues | None = None
        # By it the data loader chooses between the batch sizes of training and evaluation.
        self.split: Split = dataset.split if hasattr(dataset, "split") else dataset.index_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = self.dataset[index]
        member = int(sample.get("dataset_id", 0))
        # A blended dataset may load this index only when its first sample is read.
        of_member = getattr(self.dataset, "dataset_sample_index", None)
        within = index if of_member is None else int(of_member[index])
        place = np.array([index, self.first_member + member, within], dtype=np.int64)
        labels = {DOMAIN_KEY: self.domain_of_member[member], PLACE_KEY: place}
        values = (
            self.token_values.of(self.member(member), member, within) if self.token_values else {}
        )
        return {**sample, **labels, **values}

    def member(self, number: int) -> Any:
        """Returns a member of the blend, a dataset without members."""
        return self.dataset.datasets[number] if hasattr(self.dataset, "datasets") else self.dataset


class Domains:
    """The domains that a run's data paths name, in order of first appearance."""

    def __init__(self, args: Namespace) -> None:
        blend, per_split = get_blend_and_blend_per_split(args)
        prefixes = [
            list(member[0]) if member is not None else [] for member in per_split or [blend] * 3
        ]
        by_split = [domain_names(p) for p in prefixes]
        self.names: list[str] = list(dict.fromkeys(name for names in by_split for name in names))
        self.names = self.names or ["all"]
        train = Split.train.value
        # Path and domain of every member of the training blend.
        self.train_members = list(zip(prefixes[train], by_split[train], strict=True))
        index = {name: number for number, name in enumerate(self.names)}
        self._members = [[index[name] for name in names] or [0] for names in by_split]
        # The training data, once it is built, on ranks that draw samples.
        self.train: DomainLabelled | None = None

    def __len__(self) -> int:
        return len(self.names)

    def label(self, dataset: Any, split: Split) -> Any:
        """Labels one split's dataset, or each of several validation sets; None stays None."""
        if dataset is None:
            return None
        members = self._members[split.value]
        if isinstance(dataset, list):
            return [
                None if one is None else DomainLabelled(one, [member], number)
                for number, (one, member) in enumerate(zip(dataset, members, strict=True))
            ]
        return DomainLabelled(dataset, members)


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Returns Megatron's dataset configuration, made from its arguments."""
    config_type = GPTFIMDatasetConfig if args.fim_data else GPTDatasetConfig
    argument_of = {
        field.name: _RENAMED.get(field.name, field.name)
        for field in dataclasses.fields(config_type)
        if field.init
    }
    settings = {
        name: getattr(args, argument)
        for name, argument in argument_of.items()
        if hasattr(args, argument)
    }
    settings["blend"], settings["blend_per_split"] = get_blend_and_blend_per_split(args)
    settings["tokenizer"] = build_tokenizer(args)
    settings["sequence_parallel_size"] = args.tensor_model_parallel_size * args.sequence_parallel
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            settings["sequences_per_dataset"] = json.load(file)
    if args.fim_data:
        settings["fim_extra_tokens"] = {
            name: getattr(args, f"fim_{name}_token") for name in _FIM_TOKENS
        }
    return config_type(**settings)


def datasets_provider(
    domains: Domains,
    config: ReweightConfig,
    num_samples: Sequence[int | None],
    vp_stage: int | None = None,
) -> tuple[Any, Any, Any]:
    """Builds the training, validation and test dataset of this rank, for Megatron's `pretrain`.

    Each is a dataset, a list of them (several validation sets), or None. `num_samples` are those of
    each split, None for one epoch.
    """
    args = get_args()
    if args.sft:
        dataset_type = SFTDataset
    elif args.mock_data:
        dataset_type = MockGPTDataset
    else:
        dataset_type = GPTFIMDataset if args.fim_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    built = BlendedMegatronDatasetBuilder(
        dataset_type,
        num_samples,
        functools.partial(_is_built_here, args, vp_stage),
        dataset_config(args),
    ).build()
    print_rank_0("> finished creating GPT datasets ...")
    train, valid, test = (domains.label(built[split.value], split) for split in Split)
    if train is not None:
        domains.train = train
        if config.sample_weights or config.reference_scores:
            train.token_values = TokenValues(config, [path for path, _ in domains.train_members])
    return train, valid, test


def _is_built_here(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this rank draws samples: tensor-parallel rank 0 of a stage that needs them."""
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    # Packed sequences carry their boundaries to every pipeline stage.
    if args.sft:
        return True
    config = core_transformer_config_from_args(args)
    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(config, vp_stage)


def has_mtp(config: Any, vp_stage: int | None) -> bool:
    """Whether this rank's stage computes multi-token prediction, by core's TransformerConfig."""
    return bool(
        mtp_on_this_rank(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )
