import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_rw.data import split_dataset
from megatron_rw.data.indexed import documents as blocks
from megatron_rw.data.indexed.domains import DomainsFile
from megatron_rw.data.split_dataset import SplitConfig
from tests.data.datasets import (
    Document,
    Ended,
    call,
    datasets,
    files,
    fresh,
    read_dataset,
    write_dataset,
    write_directory,
)

# Few documents with many copies cannot always be split: examples are drawn until 25 can.
NOT_ALL = [*settings().suppress_health_check, HealthCheck.filter_too_much]
ANY_SPLIT = settings(max_examples=25, suppress_health_check=NOT_ALL)
# Few tokens, so that copies are many, within a domain and between domains.
DOCUMENT = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=1)
DOMAINS = st.dictionaries(
    st.sampled_from("ab"), st.lists(DOCUMENT, min_size=3, max_size=25), min_size=1
)
FLAGS = st.sampled_from(
    [
        "--valid-fraction 0.3",
        "--valid-fraction 0.2 --test-fraction 0.3",
        "--test-fraction 0.3",
    ]
)
SETS = ("train", "valid", "test")


def split(source: Path, output: Path, flags: str, status: int | None = 0) -> Ended:
    inputs = ("--input", source, "--output-dir", output)
    return call(split_dataset.main, *inputs, *flags.split(), status=status)


def content(document: Document) -> tuple[int, ...]:
    return tuple(token for sequence in document for token in sequence)


def contents(documents: Iterable[Document]) -> set[tuple[int, ...]]:
    return {content(document) for document in documents}


def read_sets(output: Path) -> dict[str, dict[str, list[Document]]]:
    return {
        name: {
            domain: read_dataset(output / name / entry.prefix)
            for domain, entry in DomainsFile.load(output / name / "domains.json").domains.items()
        }
        for name in SETS
        if (output / name).exists()
    }


def distinct(count: int, first: int = 0) -> list[Document]:
    return [[[number % 4096, number // 4096]] for number in range(first, first + count)]


@ANY_SPLIT
@given(domains=DOMAINS, flags=FLAGS, block_documents=st.integers(1, 9))
def test_sets_share_no_document_and_together_are_everything(
    tmp_path: Path, domains: dict[str, list[Document]], flags: str, block_documents: int
) -> None:
    tmp_path = fresh(tmp_path)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(blocks, "_DOCUMENTS", block_documents)
        source = write_directory(tmp_path / "in", domains)
        assume(split(source, out, flags, status=None).status == 0)
    sets = read_sets(out)
    assert list(sets) == ["train", *(name for name in SETS[1:] if f"--{name}" in flags)]

    seen = [contents(d for ds in per_domain.values() for d in ds) for per_domain in sets.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    for domain, documents in domains.items():
        together = [str(d) for of_set in sets.values() for d in of_set.get(domain, [])]
        assert Counter(together) == Counter(map(str, documents))
    for name, per_domain in sets.items():
        for domain, documents in per_domain.items():  # a selection, in the order that they had
            chosen = contents(documents)
            assert documents == [d for d in domains[domain] if content(d) in chosen]
        write_directory(tmp_path / "expected" / name, per_domain)
        assert datasets(out / name) == datasets(tmp_path / "expected" / name)
        prefixes = (out / name / "blend.txt").read_text().split()[1::2]
        assert prefixes == [f"{out}/{name}/{domain}_text_document" for domain in per_domain]


@ANY_SPLIT
@given(order=st.randoms(use_true_random=False), flags=FLAGS, cut=st.integers(10, 50))
def test_neither_order_nor_sharding_matters(
    tmp_path: Path, order: random.Random, flags: str, cut: int
) -> None:
    tmp_path = fresh(tmp_path)

    def chosen(documents: list[Document], status: int | None = 0) -> dict[str, Any]:
        write_directory(tmp_path / "in", {"a": documents})
        ended = split(tmp_path / "in", tmp_path / "out", f"{flags} --overwrite", status)
        sets = read_sets(tmp_path / "out") if ended.status == 0 else {}
        return {name: contents(per_domain["a"]) for name, per_domain in sets.items()}

    documents = distinct(60)
    whole = chosen(documents)
    order.shuffle(documents)
    assert chosen(documents) == whole
    for shard in (documents[:cut], documents[cut:]):
        for name, part in chosen(shard, status=None).items():
            assert part == contents(shard) & whole[name]


@pytest.mark.parametrize(
    ("flags", "valid", "test"),
    [
        ("--valid-fraction 0.1 --test-fraction 0.02", 0.1, 0.02),
        ("--valid-fraction 0.03 --test-fraction 0.5 --seed 2", 0.03, 0.5),
    ],
)
def test_fractions_are_about_right(tmp_path: Path, flags: str, valid: float, test: float) -> None:
    count = 10_000
    write_directory(tmp_path / "in", {"a": distinct(count), "b": distinct(count, count)})
    split(tmp_path / "in", tmp_path / "out", flags)
    for name, wanted in (("valid", valid), ("test", test)):
        records = DomainsFile.load(tmp_path / "out" / name / "domains.json").domains
        for entry in records.values():
            margin = 5 * (count * wanted * (1 - wanted)) ** 0.5  # five standard deviations
            assert abs(entry.documents - count * wanted) <= margin


def test_another_seed_chooses_others(tmp_path: Path) -> None:
    write_directory(tmp_path / "in", {"a": distinct(500)})
    chosen = []
    for seed in (1, 1, 2):
        flags = f"--valid-fraction 0.1 --seed {seed} --overwrite"
        split(tmp_path / "in", tmp_path / "out", flags)
        chosen.append(contents(read_sets(tmp_path / "out")["valid"]["a"]))
    assert chosen[0] == chosen[1]
    assert len(chosen[0] & chosen[2]) < 25


def test_fractions_are_of_the_two_ends_of_the_range() -> None:
    ends = np.array([0, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    where: dict[str, Any] = {"input": Path("a"), "output_dir": Path("b")}
    config = SplitConfig(**where, valid_fraction=0.25, test_fraction=0.5)
    assert config.choose(ends).tolist() == [1, 1, 0, 0, 2, 2]


def test_a_domain_that_a_set_has_nothing_of_is_left_out_and_told(tmp_path: Path) -> None:
    write_directory(tmp_path / "in", {"a": distinct(500), "b": distinct(1, 500)})
    told = split(tmp_path / "in", tmp_path / "out", "--valid-fraction 0.02").err
    sets = read_sets(tmp_path / "out")
    assert list(sets["train"]) == ["a", "b"]
    assert list(sets["valid"]) == ["a"]
    assert "valid has none of the 1 of 'b', which is left out of it" in told
    assert not list((tmp_path / "out" / "valid").glob("b_*"))


def test_a_bare_dataset_is_split_without_a_domains_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "plain", distinct(100), np.int32)
    split(tmp_path / "plain", tmp_path / "out", "--valid-fraction 0.1")
    parts = [read_dataset(tmp_path / "out" / name / "plain") for name in ("train", "valid")]
    assert sum(map(len, parts)) == 100
    assert 0 < len(parts[1]) < 30
    assert sorted(files(tmp_path / "out" / "valid")) == ["blend.txt", "plain.bin", "plain.idx"]
