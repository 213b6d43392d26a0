"""Every prediction is in one row of one block, whatever the lengths."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.errors import UserError
from megatron_rw.scoring.plan import Plan, describe, row_lengths

LENGTHS = st.lists(st.integers(0, 700), min_size=1, max_size=20).filter(any)


def plan(stride: int, micro_batch_size: int = 2) -> Plan:
    return Plan(256, stride, micro_batch_size, row_lengths(256, 1), 500)


@given(lengths=LENGTHS, stride=st.sampled_from([1, 100, 255, 256]), size=st.integers(1, 3))
def test_each_prediction_is_made_once(lengths: list[int], stride: int, size: int) -> None:
    ends = np.cumsum(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    context = np.full(sum(lengths), -1)
    for batch in plan(stride, size).micro_batches(np.array(lengths, np.int64)):
        assert len(batch.rows) * batch.length == size * 256
        for start, skipped, made in batch.rows.tolist():
            if made == 0:
                continue
            assert batch.length == 64 or made > batch.length // 2, "a shorter row would do"
            assert made <= batch.length
            predicted = np.arange(start + 1 + skipped, start + 1 + made)
            assert len(predicted) > 0
            assert (document[predicted] == document[start]).all()
            assert (context[predicted] == -1).all(), "twice"
            context[predicted] = predicted - start
    starts = ends - lengths
    for start, length in zip(starts, lengths, strict=True):
        seen = context[start : start + length]
        assert (seen[:1] == -1).all()
        before = np.arange(1, length)
        assert (seen[1:] >= np.minimum(before, 256 - stride + 1)).all(), "too little context"
        assert (seen[1:257] == before[:256]).all()


@given(lengths=LENGTHS, tokens=st.integers(1, 3000))
def test_blocks_are_the_dataset(lengths: list[int], tokens: int, tmp_path: Path) -> None:
    prefix = tmp_path / "some"
    with PairWriter(prefix, np.uint16) as writer:
        writer.write_tokens(np.arange(sum(lengths)).astype(np.uint16))
        writer.add_documents(np.array(lengths))
        writer.finalize()
    start = document = 0
    with DatasetReader(prefix) as reader:
        for block in reader.blocks(tokens):
            assert (block.start, block.first) == (start, document)
            ids = reader.read(block)
            assert ids.tolist() == list(range(start, start + len(ids)))
            assert len(ids) <= tokens or len(block.tokens) == 1
            assert block.tokens.tolist() == lengths[document : document + len(block.tokens)]
            start, document = start + len(ids), document + len(block.tokens)
    assert (start, document) == (sum(lengths), len(lengths))


def test_a_dataset_without_tokens_is_refused(tmp_path: Path) -> None:
    with PairWriter(tmp_path / "empty", np.uint16) as writer:
        writer.add_documents(np.array([0, 0]))
        writer.finalize()
    args = Namespace(data_path=[str(tmp_path / "empty")], data_args_path=None)
    for split in ("train_data", "valid_data", "test_data", "per_split_data_args"):
        setattr(args, f"{split}_path", None)
    with pytest.raises(UserError, match="holds no tokens"):
        describe(args, plan(256))
