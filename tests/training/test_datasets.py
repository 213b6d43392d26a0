"""Domain labels: names from the data paths, and the right one on every sample."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from megatron.core.datasets.utils import Split

from megatron_rw.training.datasets import Domains


def arguments(**paths: Any) -> Namespace:
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    files = ("data_args_path", "per_split_data_args_path")
    return Namespace(**dict.fromkeys((*names, *files)) | paths)


class Blended:
    """A blended dataset whose samples come from its members in turn."""

    def __init__(self, members: int) -> None:
        self.members, self.split = members, Split.train

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"dataset_id": index % self.members, "tokens": index}


def test_members_with_one_name_are_one_domain() -> None:
    blend = ["0.5", "/a/wiki_text_document", "0.3", "/b/code_text_document"]
    domains = Domains(arguments(data_path=[*blend, "0.2", "/c/wiki_text_document"]))
    assert domains.names == ["wiki", "code"]
    labelled = domains.label(Blended(3), Split.train)
    assert [labelled[i]["domain"] for i in range(6)] == [0, 1, 0, 0, 1, 0]
    assert labelled[4]["tokens"] == 4
    assert labelled.split is Split.train
    assert len(labelled) == 6


def test_splits_with_blends_of_their_own_share_the_names() -> None:
    domains = Domains(
        arguments(
            train_data_path=["1", "/a/wiki_text_document", "1", "/a/code_text_document"],
            valid_data_path=["1", "/b/code_text_document", "1", "/b/law_text_document"],
        )
    )
    assert domains.names == ["wiki", "code", "law"]
    assert domains.label(Blended(2), Split.train)[1]["domain"] == 1
    assert domains.label(Blended(2), Split.valid)[0]["domain"] == 1
    assert domains.label(Blended(2), Split.valid)[1]["domain"] == 2
    assert domains.label(None, Split.test) is None


def test_several_validation_sets_are_labelled_one_by_one() -> None:
    paths = ["/b/code_text_document", "/b/law_text_document"]
    domains = Domains(arguments(train_data_path=["/a/wiki_text_document"], valid_data_path=paths))

    class Single:
        index_split = Split.valid

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"tokens": index}

    code, law = domains.label([Single(), Single()], Split.valid)
    assert (code[0]["domain"], law[0]["domain"]) == (1, 2)
    # Their samples are not taken for each other.
    assert [list(one[0]["place"]) for one in (code, law)] == [[0, 0, 0], [0, 1, 0]]
    assert code.split is Split.valid


def test_mock_data_is_one_nameless_domain() -> None:
    domains = Domains(arguments())
    assert domains.names == ["all"]
    assert domains.label(Blended(1), Split.train)[0]["domain"] == 0


@pytest.mark.parametrize(("values", "found"), [([3, 9, 2], 9), ([], -1)])
def test_largest_token_id_is_read_from_the_data(
    values: list[int], found: int, tmp_path: Any
) -> None:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_rw.data.indexed.integrity import largest_token_id

    prefix = tmp_path / "d_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.tensor(values), [len(values)])
    builder.finalize(f"{prefix}.idx")
    assert largest_token_id(str(prefix)) == found
    assert largest_token_id(str(prefix), scan_bytes=2) == (values[0] if values else -1)
