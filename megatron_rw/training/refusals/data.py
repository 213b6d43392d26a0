"""Refusals of data: what is missing, damaged, of another tokenizer, or not what it was.

All checks run on one rank.
"""

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_rw.data.indexed import integrity
from megatron_rw.data.indexed.domains import look_up
from megatron_rw.data.tokenizers.tokenizer import model_sha256
from megatron_rw.errors import UserError
from megatron_rw.training.refusals.base import flag


def data_prefixes(args: Namespace) -> list[str]:
    """Every `.bin/.idx` prefix that the arguments name, once each, in order."""
    return list(dict.fromkeys(prefix for prefix, _ in _members(args)))


def training_prefixes(args: Namespace) -> list[str]:
    """Every `.bin/.idx` prefix of the training blend, once each, in order."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    members = (blend_per_split or [blend] * len(Split))[Split.train.value]
    return list(dict.fromkeys(members[0])) if members else []


def tokenizer_record(args: Namespace) -> dict[str, Any]:
    """Returns what tells the run's tokenizer from others; the digest is None without a file."""
    model = args.tokenizer_model
    there = model is not None and os.path.exists(model)
    return {"type": args.tokenizer_type, "sha256": model_sha256(model) if there else None}


def _members(args: Namespace) -> Iterator[tuple[str, float | None]]:
    """Every member of the blends: its prefix, and its weight where it has one."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for prefixes, weights in filter(None, [blend, *(blend_per_split or [])]):
        yield from zip(prefixes, weights or [None] * len(prefixes), strict=True)


def _on_disk(prefixes: list[str]) -> list[str]:
    return [prefix for prefix in prefixes if not is_object_storage_path(prefix)]


def _uses_no_pairs(args: Namespace) -> bool:
    """Whether the samples do not come from `.bin/.idx` pairs."""
    return bool(args.mock_data or args.sft)


def check_files(args: Namespace) -> None:
    """Checks, before validation, that the files that are named exist and the datasets are whole."""
    for name in ("data_args_path", "per_split_data_args_path", "tokenizer_model", "vocab_file"):
        path = getattr(args, name)
        # A Hugging Face tokenizer may be named by repository instead of path.
        is_path = name != "tokenizer_model" or args.tokenizer_type != "HuggingFaceTokenizer"
        if path is not None and is_path and not os.path.exists(path):
            raise UserError(f"{flag(name)} {path}: there is no such file.")
    if _uses_no_pairs(args):
        return
    if args.tokenizer_type is None and not (args.vocab_file or args.use_checkpoint_args):
        # Megatron would take GPT-2's, and try to download it.
        raise UserError(
            "no tokenizer: give the one that made the data with --tokenizer-type and "
            "--tokenizer-model (SentencePieceTokenizer and FILE.model for one that "
            "tools/train_tokenizer.py has made)."
        )
    _check_paths_given(args)
    members = list(_members(args))
    if not members:
        raise UserError(
            "no data: give --data-path PREFIX (or --data-args-path FILE), or --mock-data."
        )
    for prefix, weight in members:
        if weight is not None and not weight > 0:
            raise UserError(
                f"data path {prefix} has the weight {weight:g}, which must be above 0: leave "
                "it out to train without it."
            )
    for prefix in _on_disk(data_prefixes(args)):
        for suffix in (".idx", ".bin"):
            if not os.path.exists(prefix + suffix):
                raise UserError(_missing_data(prefix, suffix))
        integrity.check_pair(prefix)


def _check_paths_given(args: Namespace) -> None:
    """Checks the flags that name data against each other, where Megatron fails later."""
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        # Megatron cannot unpack an empty list.
        if getattr(args, name) == []:
            raise UserError(
                f"no data: {flag(name)} has no value; give a PREFIX, or --mock-data in its place."
            )
    if args.data_args_path is not None and args.split is None:
        raise UserError(
            "--data-args-path needs --split, the shares of training, validation and test: add "
            "--split 98,1,1."
        )
    has_evaluations = (
        args.eval_iters
        and args.eval_interval
        and (not args.train_iters or args.eval_interval <= args.train_iters)
    )
    if has_evaluations and args.train_data_path is not None and args.valid_data_path is None:
        raise UserError(
            "--train-data-path without --valid-data-path leaves nothing to evaluate on: give "
            "both, or --eval-iters 0."
        )


def check_split(args: Namespace) -> None:
    """Checks that every dataset has a document in every part that is used.

    Without one, Megatron would train on nothing and end well, or look for an epoch without end.
    """
    if _uses_no_pairs(args) or args.split is None:
        return
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    if not re.fullmatch(f"{number}(,{number}){{0,2}}", args.split):
        raise UserError(
            f"--split {args.split}: give up to three shares, of training, validation and test, "
            "as 98,1,1."
        )
    blend, _ = get_blend_and_blend_per_split(args)
    if blend is None:
        return
    shares = [float(share) for share in args.split.split(",")]
    if shares[0] <= 0 and not args.skip_train:
        raise UserError(f"--split {args.split} leaves nothing to train on: its first share is 0.")
    used = ("training", "validation", "test") if args.eval_iters else ("training",)
    for prefix in _on_disk(blend[0]):
        documents = integrity.check_pair(prefix)
        bounds = [round(documents * sum(shares[:i]) / sum(shares)) for i in range(len(shares) + 1)]
        for part, share, begin, end in zip(used, shares, bounds, bounds[1:], strict=False):
            if share > 0 and begin == end:
                raise UserError(
                    f"--split {args.split} (969,30,1 by default) leaves no document of {prefix} "
                    f"for {part}: it has {documents}. Give that part a larger share, or none."
                )


def _missing_data(prefix: str, suffix: str) -> str:
    if re.fullmatch(r"\d*\.?\d+", prefix):
        return f"data path {prefix} is a weight without data: give pairs of WEIGHT and PREFIX."
    if prefix.endswith((".bin", ".idx")):
        return f"data path {prefix}: give the prefix without {prefix[-4:]}."
    if os.path.isdir(prefix):
        return (
            f"data path {prefix} is a folder: give the prefixes of its datasets, as "
            f"$(cat {prefix}/blend.txt), or --data-args-path {prefix}/blend.txt --split 98,1,1."
        )
    folder, name = os.path.split(os.path.abspath(prefix))
    if not os.path.isdir(folder):
        return f"data path {prefix}: there is no folder {folder}."
    there = sorted(f[:-4] for f in os.listdir(folder) if f.endswith(".idx"))
    beside = f" {folder} has {', '.join(there[:8])}." if there else ""
    return (
        f"data path {prefix}: {name}{suffix} is missing. A data path is the common prefix of a "
        f".bin and an .idx file, as tools/preprocess_data.py writes them.{beside}"
    )


def check_vocabulary(args: Namespace) -> None:
    """Compares the data's tokenizer and token ids with the model's padded vocabulary."""
    if _uses_no_pairs(args):
        return
    model = args.tokenizer_model
    digest = tokenizer_record(args)["sha256"]
    for dataset in look_up(_on_disk(data_prefixes(args))):
        made_by, record, prefix = dataset.tokenizer, dataset.record, dataset.prefix
        if made_by is not None and digest not in (None, made_by.sha256):
            raise UserError(
                f"data path {prefix} was made with {made_by.model} of sha256 {made_by.sha256}, and "
                f"--tokenizer-model {model} is another model, or has changed since: give that one, "
                "or tokenize the text again."
            )
        largest = record.max_token_id if record else integrity.largest_token_id(prefix)
        if largest >= args.padded_vocab_size:
            raise UserError(
                f"data path {prefix} holds token id {largest}, but the model's vocabulary has "
                f"{args.padded_vocab_size} entries: the data was made with another tokenizer. "
                "Give that one with --tokenizer-model, or tokenize the text again."
            )


def fingerprints(args: Namespace) -> dict[str, str]:
    """Returns the fingerprint of every dataset on a disk, by absolute prefix."""
    return {} if _uses_no_pairs(args) else integrity.fingerprints(_on_disk(data_prefixes(args)))
