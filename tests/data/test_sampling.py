import dataclasses
import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.text.chunks import Task
from megatron_rw.data.text.domain_sampling import DomainSampler, TextSample, divide, plan
from megatron_rw.data.text.sources import InputFlags, find_sources
from megatron_rw.errors import UserError
from tests.data.conftest import write_jsonl

LINE = "x" * 1000  # a passage of its own


def fill(sample: TextSample, domain: str, lines: int, fraction: float = 1.0) -> None:
    for number in range(lines):
        sample.add(domain, iter([f"{number:06} {LINE[7:]}"]), fraction)


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.floats(0.01, 100)), min_size=1),
    st.integers(1, 20000),
)
def test_divide(parts: list[tuple[int, float]], total: int) -> None:
    sizes, weights = [part[0] for part in parts], [part[1] for part in parts]
    budgets = divide(sizes, weights, total)
    assert all(0 <= budget <= size for budget, size in zip(budgets, sizes, strict=True))
    assert min(total, sum(sizes)) - len(sizes) <= sum(budgets) <= total
    cut = [(b + 1) / w for b, size, w in zip(budgets, sizes, weights, strict=True) if b < size]
    # None gives more for its weight than one that is cut short, but for what is rounded down.
    for budget, weight in zip(budgets, weights, strict=True):
        assert budget <= min(cut, default=float("inf")) * weight * (1 + 1e-9) + len(sizes)


def test_a_sample_has_its_shares_whatever_comes_first() -> None:
    for order in (["big", "small", "tiny"], ["tiny", "small", "big"]):
        sizes = {"big": 500, "small": 50, "tiny": 5}
        sample = TextSample(100_000, {"big": 3.0, "small": 1.0, "tiny": 1.0})
        for domain in order:
            fill(sample, domain, sizes[domain])
        kept = sample.kept()
        assert kept["tiny"] == 5000  # less than its share, so all of it
        assert kept["big"] / kept["small"] == pytest.approx(3, rel=0.08)
        assert 98_000 < sum(kept.values()) <= 100_000
        assert list(kept) == order


def test_without_weights_a_sample_has_the_shares_of_the_whole() -> None:
    sample = TextSample(200_000, None)
    fill(sample, "read whole", 2000)
    fill(sample, "small", 1000)
    fill(sample, "one read in ten", 100, fraction=0.1)  # each stands for ten
    kept = sample.kept()
    for domain, share in (("read whole", 1 / 2), ("small", 1 / 4), ("one read in ten", 1 / 4)):
        assert kept[domain] / sum(kept.values()) == pytest.approx(share, abs=0.12)


def test_a_sample_is_spread_over_the_whole_and_in_order() -> None:
    sample = TextSample(500_000, {})
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
        sample = TextSample(limit, {})
        for number, size in enumerate(sizes):
            sample.add("d", iter([f"{number} " + "é" * size]))
        lines = Counter(sample.take())
        assert sum(len(line.encode()) for line in lines) <= limit
        return lines

    assert kept(limit) <= kept(2 * limit)
    assert sum(kept(10**6).values()) == len(sizes)


def sampler(
    chunk_bytes: int = 1 << 20, limit: int = 0, bad: float = 0.0, weights: Any = None
) -> DomainSampler:
    found = DomainSampler(InputFlags(input=("in",)), "text", weights, limit, bad)
    found.reading = dataclasses.replace(found.reading, chunk_bytes=chunk_bytes)
    return found


def read_texts(parts: list[Task], reader: DomainSampler) -> list[str]:
    texts = [text for part in parts for _, text in reader.documents(part)]
    reader.check_bad(at_end=True)
    return texts


@pytest.mark.parametrize(
    ("name", "chunk", "bad", "place"),
    [
        ("c.jsonl", 230, 0, "line 1:"),
        ("c.jsonl", 230, 40, "line 1 of those from byte 920 on:"),
        ("c.jsonl", 230, 99, "line 10 of those from byte 2070 on:"),
        ("c.jsonl.gz", 1, 99, "line 100:"),
    ],
)
def test_a_bad_line_is_found_by_its_number(
    tmp_path: Path, name: str, chunk: int, bad: int, place: str
) -> None:
    lines = [f'{{"text": "{number:010}"}}\n' for number in range(100)]  # of 23 bytes
    lines[10] = " " * 22 + "\n"
    lines[bad] = '{"txt": "0123456789"}\n'.replace("}", " }")
    content = "".join(lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    reader = sampler(chunk)
    parts = plan(find_sources([str(path)]), reader.reading, 10**9)
    with pytest.raises(UserError, match=rf"{name}, {place} no field 'text' .*; 1 of "):
        read_texts(parts, reader)
    lenient = sampler(chunk, bad=0.02)
    assert len(read_texts(parts, lenient)) == 98
    assert lenient.bad == 1


def test_most_lines_bad_is_an_error_before_all_are_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"txt": "x"}] * 20_000)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}] * 20_000)
    reader = sampler(bad=0.6)
    parts = plan(find_sources([str(tmp_path)]), reader.reading, 10**9)
    with pytest.raises(UserError, match="20,000 of 20,000 lines read are bad"):
        list(reader.documents(parts[0]))


def test_of_large_inputs_parts_are_read_spread_over_the_whole(tmp_path: Path) -> None:
    records = [{"text": f"{number:06}" + "x" * 81} for number in range(2000)]  # 100 bytes a line
    write_jsonl(tmp_path / "c.jsonl", records)
    reader = sampler(1000)
    parts = plan(find_sources([str(tmp_path)]), reader.reading, 20_000)
    assert [part.fraction for part in parts] == [0.1] * 20
    found = [int(text[:6]) for text in read_texts(parts, reader)]
    assert len(found) == 200
    assert set(Counter(number // 200 for number in found).values()) == {20}


def test_of_many_compressed_files_some_are_read_whole(tmp_path: Path) -> None:
    for number in range(20):
        write_jsonl(tmp_path / f"{number:02}.jsonl.gz", [{"text": str(number)}] * 50)
    sources = find_sources([str(tmp_path)])
    reading = sampler().reading
    total = sum(source.text_bytes for source in sources)
    assert [part.source for part in plan(sources, reading, total)] == sources
    some = plan(sources, reading, total // 5)
    assert [(part.number, part.fraction) for part in some] == [(-1, 0.2)] * 4
    places = [sources.index(part.source) for part in some]
    assert places == [2, 7, 12, 17]
    assert len(plan(sources, reading, 1)) == 1


def test_row_groups_of_parquet_are_entered_anywhere(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"{number:06}" for number in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=100)
    sources = find_sources([str(tmp_path)])
    reader = sampler(1)
    parts = plan(sources, reader.reading, sources[0].size // 4)
    assert [part.fraction for part in parts] == [0.2] * 4
    assert len(read_texts(parts, reader)) == 400


def test_reading_stops_short_of_a_large_domain_and_not_of_a_small_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "big.jsonl", [{"text": "abc " * 250}] * 1500)
    write_jsonl(tmp_path / "small.jsonl", [{"text": "xyz " * 250}] * 40)
    sources = find_sources([str(tmp_path)])
    reader = sampler(10_000, limit=20_000, weights={})
    parts = reader.plan(sources)
    read = {source.name: 0 for source in sources}
    for part in parts:
        read[part.source.name] += 10_000
    assert read["small.jsonl"] >= sources[1].size
    assert 100_000 < read["big.jsonl"] < 400_000
    kept = reader.draw(parts, lambda text: iter([text])).kept()
    assert kept["big"] == pytest.approx(10_000, abs=1100)
    assert kept["small"] == pytest.approx(10_000, abs=1100)
