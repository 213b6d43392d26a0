import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_rw.data import split_dataset
from megatron_rw.data.indexed import documents as blocks
from megatron_rw.data.indexed import held_out
from megatron_rw.data.indexed.domains import DomainsFile
from megatron_rw.data.indexed.held_out import HeldOut, Share, choose
from tests.data.datasets import (
    TOKENIZER,
    Document,
    exit_status,
    files,
    read_dataset,
    record,
    write_dataset,
    write_directory,
)

IN_TEMPORARY = settings(
    max_examples=25,
    # Few documents with many copies cannot always be split: examples are drawn until 25 can.
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.filter_too_much],
)
# Few tokens, so that copies are many, within a domain and between domains.
DOCUMENT = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=2)
DOMAINS = st.dictionaries(
    st.sampled_from("ab"), st.lists(DOCUMENT, min_size=3, max_size=25), min_size=1
)
FLAGS = st.sampled_from(
    [
        "--valid-fraction 0.3",
        "--valid-documents 2 --test-documents 3",
        "--valid-fraction 0.2 --test-fraction 0.3",
        "--valid-fraction 0.2 --test-documents 1",
        "--valid-documents 1 --test-fraction 0.3",
        "--test-documents 2",
    ]
)
SETS = ("train", "valid", "test")


def split(source: Path, output: Path, flags: str) -> int:
    inputs = ("--input", source, "--output-dir", output)
    return exit_status(split_dataset.main, *inputs, *flags.split())


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


@IN_TEMPORARY
@given(domains=DOMAINS, flags=FLAGS, block_documents=st.integers(1, 9), hashes=st.integers(1, 9))
def test_sets_share_no_document_and_together_are_everything(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    domains: dict[str, list[Document]],
    flags: str,
    block_documents: int,
    hashes: int,
) -> None:
    monkeypatch.setattr(blocks, "_DOCUMENTS", block_documents)
    monkeypatch.setattr(held_out, "_HASHES", hashes)
    tmp_path = tmp_path_factory.mktemp("split")
    assume(split(write_directory(tmp_path / "in", domains), tmp_path / "out", flags) == 0)
    sets = read_sets(tmp_path / "out")
    assert list(sets) == ["train", *(name for name in SETS[1:] if f"--{name}" in flags)]

    seen = [contents(d for ds in per_domain.values() for d in ds) for per_domain in sets.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    for domain, documents in domains.items():
        together = [str(d) for per_domain in sets.values() for d in per_domain[domain]]
        assert Counter(together) == Counter(map(str, documents))
    for name, per_domain in sets.items():
        for domain, documents in per_domain.items():  # a selection, in the order that they had
            chosen = contents(documents)
            assert documents == [d for d in domains[domain] if content(d) in chosen]
        write_directory(tmp_path / "expected" / name, per_domain)
        assert files(tmp_path / "out" / name) == files(tmp_path / "expected" / name)
        assert [line.split()[1] for line in blend(tmp_path / "out" / name)] == [
            f"{tmp_path}/out/{name}/{domain}_text_document" for domain in domains
        ]


def blend(directory: Path) -> list[str]:
    return (directory / "blend.txt").read_text().splitlines()


def distinct(count: int, first: int = 0) -> list[Document]:
    return [[[number % 4096, number // 4096]] for number in range(first, first + count)]


@IN_TEMPORARY
@given(order=st.randoms(use_true_random=False), flags=FLAGS, cut=st.integers(10, 50))
def test_neither_order_nor_sharding_matters(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random, flags: str, cut: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("split")
    documents = distinct(60)
    write_directory(tmp_path / "in", {"a": documents})
    assert split(tmp_path / "in", tmp_path / "out", flags) == 0
    whole = {name: contents(ds["a"]) for name, ds in read_sets(tmp_path / "out").items()}
    order.shuffle(documents)
    write_directory(tmp_path / "shuffled", {"a": documents})
    assert split(tmp_path / "shuffled", tmp_path / "again", flags) == 0
    assert {n: contents(ds["a"]) for n, ds in read_sets(tmp_path / "again").items()} == whole
    if "documents" in flags:
        return  # a number of documents is a number of each input
    for shard in (documents[:cut], documents[cut:]):
        write_dataset(tmp_path / "shard_text_document", shard)
        DomainsFile(TOKENIZER, {"shard": record("shard", shard)}).save(tmp_path / "domains.json")
        if split(tmp_path / "shard_text_document", tmp_path / "part", f"{flags} --overwrite") == 0:
            for name, ds in read_sets(tmp_path / "part").items():
                assert contents(ds["shard"]) == contents(shard) & whole[name]


def test_fractions_and_numbers_are_about_right(tmp_path: Path) -> None:
    count = 20_000
    write_directory(tmp_path / "in", {"a": distinct(count), "b": distinct(count, count)})
    for number, (flags, expected) in enumerate(
        {
            "--valid-fraction 0.1 --test-fraction 0.02": (0.1 * count, 0.02 * count),
            "--valid-documents 300 --test-documents 50": (300, 50),
            "--valid-documents 300 --test-fraction 0.02 --seed 2": (300, 0.02 * count),
            "--valid-fraction 0.1 --test-documents 50 --seed 2": (0.1 * count, 50),
        }.items()
    ):
        output = tmp_path / str(number)
        assert split(tmp_path / "in", output, flags) == 0
        sets = read_sets(output)
        for name, wanted in zip(SETS[1:], expected, strict=True):
            exact = f"--{name}-documents" in flags
            # Five standard deviations of a binomial count.
            margin = 0 if exact else 5 * (wanted * (1 - wanted / count)) ** 0.5
            for documents in sets[name].values():
                assert abs(len(documents) - wanted) <= margin


def test_another_seed_chooses_others(tmp_path: Path) -> None:
    write_directory(tmp_path / "in", {"a": distinct(500)})
    chosen = []
    for seed in (1, 1, 2):
        flags = f"--valid-documents 50 --seed {seed} --overwrite"
        assert split(tmp_path / "in", tmp_path / "out", flags) == 0
        chosen.append(contents(read_sets(tmp_path / "out")["valid"]["a"]))
    assert chosen[0] == chosen[1]
    assert len(chosen[0] & chosen[2]) < 25


HASH = st.integers(0, 12) | st.integers((1 << 64) - 3, (1 << 64) - 1)


@IN_TEMPORARY
@given(
    some=st.lists(HASH, max_size=40),
    two=st.sets(HASH, min_size=2, max_size=2),
    place=st.integers(0, 99),
)
def test_the_smallest_hashes_are_taken_with_all_their_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, some: list[int], two: set[int], place: int
) -> None:
    monkeypatch.setattr(held_out, "_HASHES", 3)
    hashes = [*some, *two]
    np.array(hashes, np.uint64).tofile(tmp_path / "hashes")
    # Documents are left over, or the choice is refused.
    count = 1 + place % sum(value < max(hashes) for value in hashes)
    limit = sorted(hashes)[count - 1]
    chosen = choose({"a": tmp_path / "hashes"}, Share(documents=count), Share())
    sets = chosen.sets(np.array(hashes, np.uint64))
    assert (sets == 1).tolist() == [value <= limit for value in hashes]


def test_fractions_are_of_the_two_ends_of_the_range() -> None:
    ends = np.array([0, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert HeldOut(below=2**62, last=2**63).sets(ends).tolist() == [1, 1, 0, 0, 2, 2]


def test_a_bare_dataset_is_split_without_a_domains_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "plain", distinct(100), np.int32)
    assert split(tmp_path / "plain", tmp_path / "out", "--valid-documents 7") == 0
    parts = [read_dataset(tmp_path / "out" / name / "plain") for name in ("train", "valid")]
    assert [len(documents) for documents in parts] == [93, 7]
    assert sorted(path.name for path in (tmp_path / "out" / "valid").iterdir()) == [
        "blend.txt", "plain.bin", "plain.idx",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--valid-documents 9", "the domain 'b', of 5 documents, would have none in train; hold"),
        ("--valid-fraction 1e-9", "the domain 'a', of 50 documents, would have none in valid; "),
        ("--valid-documents 4 --test-documents 1", "'b', of 5 documents, would have none in train"),
    ],
)
def test_an_empty_set_is_an_error_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    write_directory(tmp_path / "in", {"a": distinct(50), "b": distinct(5, 50)})
    assert split(tmp_path / "in", tmp_path / "out", flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "hold something out"),
        ("--valid-fraction 1", "--valid-fraction 1.0: give a number between 0 and 1"),
        ("--test-fraction nan", "--test-fraction nan: give a number between 0 and 1"),
        ("--valid-fraction 0.5 --test-fraction 0.5", "leave nothing to train on"),
        ("--test-documents 0", "--test-documents 0: give a number of at least 1"),
        ("--test-documents 1 --test-fraction 0.1", "--test-fraction"),
        ("--test-documents 1 --seed -1", "--seed -1: give a number from 0"),
        ("--test-documents 1", "in: has no domains.json; give a complete directory"),
    ],
)
def test_flags_and_inputs_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    (tmp_path / "in").mkdir()
    assert split(tmp_path / "in", tmp_path / "out", flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_directory(tmp_path / "train", {"a": distinct(50)})
    assert split(tmp_path / "train", tmp_path, "--valid-documents 2") == 2
    assert "holds datasets already (domains.json)" in capsys.readouterr().err
    assert split(tmp_path / "train", tmp_path, "--valid-documents 2 --overwrite") == 2
    assert "--input would be replaced" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train"]
