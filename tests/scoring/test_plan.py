"""Every prediction is in one row of one block, whatever the lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.indexed.pair import PairWriter, idx_path
from megatron_rw.errors import UserError
from megatron_rw.scoring.plan import Blocks, Plan, row_lengths

LENGTHS = st.lists(st.integers(0, 700), min_size=1, max_size=20).filter(any)


def plan(stride: int, micro_batch_size: int = 2) -> Plan:
    return Plan(256, stride, micro_batch_size, row_lengths(256, 1), 500)


def write(prefix: Path, lengths: list[int]) -> None:
    with PairWriter(prefix, np.uint16) as writer:
        writer.write_tokens(np.arange(sum(lengths)).astype(np.uint16))
        writer.add_documents(np.array(lengths))
        writer.finalize()


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


@given(lengths=LENGTHS, block_tokens=st.integers(1, 3000))
def test_blocks_are_the_dataset(lengths: list[int], block_tokens: int, tmp_path: Path) -> None:
    prefix = tmp_path / "some"
    write(prefix, lengths)
    blocks = Blocks(str(prefix), block_tokens)
    assert (blocks.documents, blocks.tokens) == (len(lengths), sum(lengths))
    parts = [blocks[number] for number in range(len(blocks))]
    assert [n for part in parts for n in part.lengths.tolist()] == lengths
    token = document = 0
    for part in parts:
        assert (part.first, part.start) == (document, token)
        assert blocks.ids(part).tolist() == list(range(token, token + part.tokens))
        assert part.tokens < block_tokens + max(lengths)
        token, document = token + part.tokens, document + len(part.lengths)


def test_an_index_with_gaps_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "gaps"
    write(prefix, [5, 5, 5])
    content = bytearray(idx_path(prefix).read_bytes())
    # The offset of the second document, after the header and three lengths.
    at = 34 + 3 * 4 + 8
    content[at : at + 8] = (12).to_bytes(8, "little")
    idx_path(prefix).write_bytes(content)
    blocks = Blocks(str(prefix), 1000)
    with pytest.raises(UserError, match=r"gaps.idx: documents 0 to 2 do not lie one after"):
        blocks[0]


def test_a_dataset_without_tokens_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "empty", [0, 0])
    with pytest.raises(UserError, match="holds no tokens"):
        Blocks(str(tmp_path / "empty"), 1000)
