import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rw.data import spread_reading
from megatron_rw.data.command import InputError
from megatron_rw.data.domain_sampling import draw_sample, plan_reading
from megatron_rw.data.sampling import Sample, divide
from megatron_rw.data.spread_reading import Part, plan, read_documents
from tests.data.conftest import write_jsonl

LINE = "x" * 1000  # a passage of its own


def fill(sample: Sample, domain: str, lines: int, fraction: float = 1.0) -> None:
    for number in range(lines):
        sample.add(domain, iter([f"{number:06} {LINE[7:]}"]), fraction)


def numbers(sample: Sample) -> list[int]:
    return [int(line[:6]) for line in sample.take()]


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
        sample = Sample(100_000, {"big": 3.0, "small": 1.0, "tiny": 1.0})
        for domain in order:
            fill(sample, domain, sizes[domain])
        kept = sample.kept()
        assert kept["tiny"] == 5000  # less than its share, so all of it
        assert kept["big"] / kept["small"] == pytest.approx(3, rel=0.08)
        assert 98_000 < sum(kept.values()) <= 100_000
        assert list(kept) == order


def test_without_weights_a_sample_has_the_shares_of_the_whole() -> None:
    sample = Sample(300_000, None)
    fill(sample, "big", 2000)
    fill(sample, "small", 1000)
    kept = sample.kept()
    assert kept["small"] / sum(kept.values()) == pytest.approx(1 / 3, abs=0.08)


def test_a_sample_is_spread_over_the_whole_and_in_order() -> None:
    sample = Sample(500_000, {})
    fill(sample, "d", 5000)
    found = numbers(sample)
    assert found == sorted(found)
    assert len(found) == 500
    tenths = Counter(number // 500 for number in found)
    assert sorted(tenths) == list(range(10))
    assert max(tenths.values()) < 80  # 50 each, plus four standard deviations


def test_a_part_read_in_ten_stands_for_ten() -> None:
    sample = Sample(200_000, None)
    fill(sample, "read whole", 2000)
    fill(sample, "read in part", 200, fraction=0.1)
    kept = sample.kept()
    assert kept["read in part"] / sum(kept.values()) == pytest.approx(1 / 2, abs=0.12)


def test_a_sample_never_holds_more_than_its_limit() -> None:
    sample = Sample(20_000, {})
    for number in range(300):
        fill(sample, f"d{number % 7}", 1)
        assert sum(sample.kept().values()) <= 20_000
    assert sum(sample.kept().values()) > 18_000


@given(st.lists(st.integers(0, 3000), max_size=60), st.integers(0, 50_000))
def test_a_smaller_sample_is_part_of_a_larger(sizes: list[int], limit: int) -> None:
    def kept(limit: int) -> Counter[str]:
        sample = Sample(limit, {})
        for number, size in enumerate(sizes):
            sample.add("d", iter([f"{number} " + "é" * size]))
        lines = Counter(sample.take())
        assert sum(len(line.encode()) for line in lines) <= limit
        return lines

    assert kept(limit) <= kept(2 * limit)
    assert sum(kept(10**6).values()) == len(sizes)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 100))
@example([3, 3, 3, 3], len('{"text": "0 ééé"}\n'.encode()))
def test_windows_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], window: int
) -> None:
    texts = [f"{number} " + "é" * length for number, length in enumerate(lengths)]
    path = tmp_path_factory.mktemp("w") / "c.jsonl"
    write_jsonl(path, [{"text": text} for text in texts])
    size = path.stat().st_size
    parts = [Part(path, start, start + window, 1.0) for start in range(0, size, window)]
    found = [text for part in parts for _, text in read_documents(part, "text", None)]
    assert found == texts


@pytest.mark.parametrize("bad", [0, 40, 99])
@pytest.mark.parametrize("before", [0, 1, 30])
def test_a_bad_line_in_a_window_has_its_number_in_the_file(
    tmp_path: Path, bad: int, before: int
) -> None:
    path = tmp_path / "c.jsonl"
    lines = [f'{{"text": "{number:010}"}}\n' for number in range(100)]
    lines[10] = "\n"
    lines[bad] = '{"txt": 1}\n'
    path.write_text("".join(lines))
    start = max(0, sum(map(len, lines[:bad])) - before)
    with pytest.raises(InputError, match=rf"c\.jsonl, line {bad + 1}: no field 'text'"):
        list(read_documents(Part(path, start, start + 100, 1.0), "text", None))


def test_of_large_inputs_parts_are_read_spread_over_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread_reading, "_WINDOW_BYTES", 1000)
    records = [{"text": f"{number:06}" + "x" * 81} for number in range(2000)]  # 100 bytes a line
    path = write_jsonl(tmp_path / "c.jsonl", records)
    parts = plan([path], 20_000)
    assert [part.fraction for part in parts] == [0.1] * 20
    found = [int(text[:6]) for part in parts for _, text in read_documents(part, "text", None)]
    assert len(found) == 200
    assert set(Counter(number // 200 for number in found).values()) == {20}


def test_of_many_compressed_files_some_are_read_whole(tmp_path: Path) -> None:
    paths = [
        write_jsonl(tmp_path / f"{number:02}.jsonl.gz", [{"text": str(number)}] * 50)
        for number in range(20)
    ]
    total = sum(map(spread_reading.volume, paths))
    assert [part.path for part in plan(paths, total)] == paths
    some = plan(paths, total // 5)
    assert [(part.end, part.fraction) for part in some] == [(None, 0.2)] * 4
    places = [paths.index(part.path) for part in some]
    assert [after - before for before, after in itertools.pairwise(places)] == [5] * 3
    assert len(plan(paths, 1)) == 1


def test_reading_stops_short_of_a_large_domain_and_not_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread_reading, "_WINDOW_BYTES", 10_000)
    big = write_jsonl(tmp_path / "big.jsonl", [{"text": "abc " * 250}] * 1500)
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": "xyz " * 250}] * 40)
    parts = plan_reading([big, small], None, {}, 20_000)
    read = {path: [part for part in parts if part.path == path] for path in (big, small)}
    assert read[small] == [Part(small, 0, None, 1.0)]
    assert 100_000 < sum(10_000 for _ in read[big]) < 400_000
    kept = draw_sample(parts, "text", None, {}, 20_000).kept()
    assert kept["big"] == pytest.approx(10_000, abs=1100)
    assert kept["small"] == pytest.approx(10_000, abs=1100)
