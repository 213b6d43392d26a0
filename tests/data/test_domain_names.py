from pathlib import Path

import pytest

from megatron_rw.data.text.domain_names import domain_of_file
from megatron_rw.data.text.sources import Source

SHARDS = {
    "the directory": [
        *(f"part-{number:05}.jsonl" for number in range(600)),
        "part-7.jsonl", "shard_12.jsonl", "chunk3.jsonl.gz", "00000-of-00128.parquet",
        "000_00000.parquet", "29.jsonl.zst", "3.json",
        "part-00003-5c6b1d2e-1a2b-3c4d-5e6f-0123456789ab-c000.json.gz",
    ],
    "train": ["train-00000-of-00128.parquet", "train-00001-of-00059-0123456789abcdef.parquet"],
    "c4-train": ["c4-train.00000-of-01024.json.gz", "c4-train.01023-of-01024.json.gz"],
    "file": ["file.jsonl.1", "file.jsonl", "file.2.jsonl"],
    "web": ["web-000.jsonl", "web_999.jsonl", "web-4711.jsonl", "web-shard-12.jsonl", "web.jsonl"],
    "cc": ["cc-2019-35.jsonl", "cc-2019-35-00007.jsonl", "cc-2019-35_part_7.jsonl", "cc-2.jsonl"],
}  # fmt: skip
# Files that belong to no others, whatever stands beside them.
ALONE = ["wiki", "books", "v2", "2023-news", "mp3", "partition3", "web-x86"]


@pytest.mark.parametrize("domain", SHARDS)
def test_shards_of_one_corpus_are_one_domain(domain: str) -> None:
    assert {domain_of_file(name, "the directory", "corpus") for name in SHARDS[domain]} == {domain}


def test_other_files_are_their_own_domain_and_every_file_is_one_on_request() -> None:
    assert [domain_of_file(f"{name}.jsonl", "d", "corpus") for name in ALONE] == ALONE
    assert domain_of_file("part-00001.x.jsonl", "d", "file") == "part-00001"
    assert domain_of_file("part-00001.x.jsonl", "d", "directory") == "d"


@pytest.mark.parametrize("path", ["part-1.jsonl", "./part-1.jsonl", "s3://x/data/part-1.jsonl"])
def test_the_directory_is_known_whatever_the_path(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert Source(path, "jsonl", None, 0, "").domain("corpus") == "data"
