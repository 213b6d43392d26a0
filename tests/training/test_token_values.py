"""Where every label of a sample is from, and what files say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_rw.data.indexed.pair import Index
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training.datasets import DomainLabelled
from megatron_rw.training.token_values import TokenValues, origin_of
from tests.data.datasets import write_dataset

SEQ = 16
# Shorter and longer than a sequence, and empty.
LENGTHS = [1, 40, 3, 0, 7, 16, 17, 2, 90, 5, 33, 1]


class Tokenizer:
    """What a dataset asks of one."""

    vocab_size, eod, pad = 1 << 15, 1 << 14, -1
    unique_identifiers: ClassVar = {"name": "tokens that tell their place"}
    special_tokens_dict: ClassVar[dict[str, int]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets whose tokens are their places, with weights and scores that tell them too."""
    folder = tmp_path_factory.mktemp("values")
    rng = np.random.default_rng(3)
    for base, name in enumerate(("a", "b")):
        lengths = rng.permutation(LENGTHS)
        ids = iter(range(1000 * base, 1000 * base + sum(LENGTHS)))
        documents = [[[next(ids) for _ in range(length)]] for length in lengths]
        write_dataset(folder / name, documents, np.int32)
        weights = 100 * base + np.arange(len(LENGTHS), dtype=np.float32)
        np.save(folder / f"{name}.npy", weights)
        scores = 1000 * base + np.arange(sum(LENGTHS), dtype=np.float32)
        for kind, factor in (("early", 3), ("late", 1)):
            (folder / kind).mkdir(exist_ok=True)
            np.save(folder / kind / f"{name}.token_losses.npy", factor * scores)
    return folder


def blended(folder: Path, cache: Path | None, names: str, **config: Any) -> Any:
    prefixes = [str(folder / name) for name in names]
    settings = GPTDatasetConfig(
        random_seed=5,
        sequence_length=SEQ,
        blend=(prefixes, [0.7, 0.3] if len(names) > 1 else None),
        split="1,0,0",
        path_to_cache=str(cache) if cache else None,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **config,
    )
    # Several epochs of either dataset.
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [80, 0, 0], lambda: True, settings)
    return builder.build()[Split.train.value]


def document_of(index: Index, token: int) -> tuple[int, int]:
    """The document and the place in it of a token of the .bin, found by counting."""
    for document, length in enumerate(index.lengths.tolist()):
        if token < length:
            return document, token
        token -= length
    raise AssertionError(token)


@pytest.mark.parametrize(("names", "extra"), [("a", True), ("ab", True), ("ab", False)])
def test_every_label_has_the_values_of_its_document_and_token(
    folder: Path, tmp_path: Path, names: str, extra: bool
) -> None:
    data = blended(folder, tmp_path, names, add_extra_token_to_sequence=extra)
    labelled = DomainLabelled(data, range(len(names)))
    config = ReweightConfig(
        strategy="linupper",
        signal="learnability",
        sample_weights=str(folder),
        reference_scores=[str(folder / "early"), str(folder / "late")],
    )
    labelled.token_values = TokenValues(config, [str(folder / name) for name in names])
    indexes = [Index.open(folder / name) for name in names]
    seen = set()
    for position in range(len(labelled)):
        sample = labelled[position]
        labels = sample["labels"].tolist()[: SEQ if extra else SEQ - 1]
        _, member, within = sample["place"].tolist()
        origin = origin_of(labelled.member(member), within)
        places = list(zip(origin.documents.tolist(), origin.offsets.tolist(), strict=True))
        assert places == [document_of(indexes[member], label % 1000) for label in labels]
        weights = [100.0 * member + document for document, _ in places]
        assert sample["sample_weights"].tolist() == weights + [1.0] * (not extra)
        # Early minus late.
        assert sample["reference"].tolist()[: len(labels)] == [2.0 * label for label in labels]
        assert np.isnan(sample["reference"][len(labels) :]).all()
        assert sample["sample_weights"].dtype == sample["reference"].dtype == np.float32
        seen.add((member, len({document for document, _ in places}) > 1))
    assert seen == {(member, several) for member in range(len(names)) for several in (True, False)}


def test_the_stretch_of_a_document_ends_where_it_does(folder: Path, tmp_path: Path) -> None:
    """Also where the last document of an epoch is the first of the next."""
    data = blended(folder, tmp_path, "a")
    for within in range(len(data)):
        origin = origin_of(data, within)
        labels = data[within]["labels"].tolist()
        for position, label in enumerate(labels):
            document, offset, count = origin.stretch(position)
            assert (document, offset) == document_of(Index.open(folder / "a"), label)
            following = [label + ahead for ahead in range(count)]
            assert labels[position : position + count] == following
            length = int(Index.open(folder / "a").lengths[document])
            assert offset + count == length or position + count == len(labels)
