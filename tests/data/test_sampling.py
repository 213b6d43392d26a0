import dataclasses
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.text import domain_sampling
from megatron_rw.data.text.chunks import Reading, Task, read
from megatron_rw.data.text.domain_sampling import TextSample, chosen, draw
from megatron_rw.data.text.sources import InputFlags, find_sources
from megatron_rw.errors import UserError
from tests.data.conftest import write_jsonl

LINE = "x" * 1000
READING = Reading(1000, 1 << 20, ("text",), whole_files=True)


def fill(sample: TextSample, domain: str, lines: int) -> None:
    for number in range(lines):
        sample.add(domain, iter([f"{number:06} {LINE[7:]}"]))


def test_a_sample_has_as_much_of_each_domain_whatever_comes_first() -> None:
    for order in (["big", "small", "tiny"], ["tiny", "small", "big"]):
        sizes = {"big": 500, "small": 100, "tiny": 5}
        sample = TextSample(100_000)
        for domain in order:
            fill(sample, domain, sizes[domain])
        kept = {name: domain.kept for name, domain in sample.domains.items()}
        assert kept["tiny"] == 5000  # less than its share, so all of it
        assert kept["big"] / kept["small"] == pytest.approx(1, rel=0.08)
        assert 98_000 < sum(kept.values()) == sample.kept <= 100_000
        assert list(kept) == order


def test_a_sample_is_spread_over_the_whole_and_in_order() -> None:
    sample = TextSample(500_000)
    fill(sample, "d", 5000)
    found = [int(line[:6]) for line in sample.take()]
    assert found == sorted(found)
    assert len(found) == 500
    tenths = Counter(number // 500 for number in found)
    assert sorted(tenths) == list(range(10))
    assert max(tenths.values()) < 80  # 50 each, plus four standard deviations


@given(st.lists(st.integers(0, 3000), max_size=60), st.integers(0, 50_000))
def test_a_smaller_sample_is_part_of_a_larger(sizes: list[int], limit: int) -> None:
    def kept(limit: int) -> Counter[str]:
        sample = TextSample(limit)
        for number, size in enumerate(sizes):
            sample.add("d", iter([f"{number} " + "é" * size]))
        lines = Counter(sample.take())
        assert sum(len(line.encode()) for line in lines) <= limit
        return lines

    assert kept(limit) <= kept(2 * limit)
    assert sum(kept(10**6).values()) == len(sizes)


def choose(folder: Path, max_bytes: int, reading: Reading = READING) -> list[Task]:
    inputs = InputFlags(input=(str(folder),))
    return chosen(find_sources(inputs.input), inputs, reading, max_bytes)


def read_texts(pieces: list[Task], reading: Reading = READING) -> list[str]:
    chunks = (chunk for piece in pieces for chunk in read(piece, reading))
    return [str(raw.content) for chunk in chunks for raw in chunk.documents]


def test_most_lines_bad_is_an_error_before_all_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"txt": "x"}] * 20_000)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}] * 20_000)
    inputs = InputFlags(input=(str(tmp_path),))
    with pytest.raises(UserError, match=r"a\.jsonl: no field 'text' .*; 20,000 of 20,000 lines re"):
        draw(inputs, "text", 10**6, 0.6, iter)
    monkeypatch.setattr(domain_sampling, "too_many_bad", lambda *_, at_end: False)
    sample, bad = draw(inputs, "text", 10**6, 0.6, iter)
    assert (list(sample.domains), sample.kept, bad) == (["b"], 20_000, 20_000)


def test_of_large_inputs_parts_are_read_spread_over_the_whole(tmp_path: Path) -> None:
    records = [{"text": f"{number:06}" + "x" * 81} for number in range(2000)]  # 100 bytes a line
    write_jsonl(tmp_path / "c.jsonl", records)
    pieces = choose(tmp_path, 20_000)
    found = [int(text.split('"')[3][:6]) for text in read_texts(pieces)]
    assert len(found) == 200
    assert set(Counter(number // 200 for number in found).values()) == {20}
    assert choose(tmp_path, 10**6) == choose(tmp_path, 10**9)
    assert len(choose(tmp_path, 1)) == 1


def test_of_many_compressed_files_some_are_read_whole(tmp_path: Path) -> None:
    for number in range(20):
        write_jsonl(tmp_path / f"c-{number:05}.jsonl.gz", [{"text": str(number)}] * 50)
    sources = find_sources([str(tmp_path)])
    total = sum(source.text_bytes for source in sources)
    assert [piece.source for piece in choose(tmp_path, total)] == sources
    some = choose(tmp_path, total // 5)
    assert len(read_texts(some)) == 50 * len(some)
    places = [sources.index(piece.source) for piece in some]
    assert places == [2, 7, 12, 17]
    assert len(choose(tmp_path, 1)) == 1


def test_row_groups_of_parquet_are_entered_anywhere(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"{number:06}" for number in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=100)
    reading = dataclasses.replace(READING, chunk_bytes=1)
    pieces = choose(tmp_path, (tmp_path / "c.parquet").stat().st_size // 4, reading)
    assert len(read_texts(pieces, reading)) == 400


def test_reading_stops_short_of_a_large_domain_and_not_of_a_small_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "big.jsonl", [{"text": "abc " * 250}] * 1500)
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": "xyz " * 250}] * 40)
    reading = dataclasses.replace(READING, chunk_bytes=10_000)
    pieces = choose(tmp_path, 16 * 20_000, reading)
    sizes = {"big.jsonl": 0, "small.jsonl": 0}
    for piece in pieces:
        sizes[piece.source.name] += piece.stored_bytes
    assert sizes["small.jsonl"] == small.stat().st_size
    assert 100_000 < sizes["big.jsonl"] <= 160_000 + 10_000
