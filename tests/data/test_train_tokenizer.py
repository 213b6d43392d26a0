import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rw.data import train_tokenizer
from megatron_rw.data.core_tokenizer import build_core_tokenizer
from megatron_rw.data.tokenizer_flags import TokenizerFlags
from megatron_rw.data.train_tokenizer import even_budgets, spread_sample
from tests.data.conftest import make_texts, write_jsonl

# U+2581 is SentencePiece's mark for the space, and the one character that does not survive.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl.gz"
    return write_jsonl(path, [{"text": text, "body": "b" + text} for text in make_texts(200, 1)])


def train(*flags: object) -> int:
    return train_tokenizer.main([str(flag) for flag in flags])


@settings(deadline=None)
@given(TEXTS)
@example("def f(x):\n\tif x:\n        return  '''a\n\n\n'''\n")
@example("  leading, trailing  ")
@example("\r\n\x00\x07 e\u0301 \ufb01 \u3000 \u2585 \u2047 <pad> </s>")
def test_text_round_trips(model: str, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert processor.decode(processor.encode(text)) == text


@settings(deadline=None)
@given(TEXTS)
@example("<unk><s></s><pad>")
def test_no_text_makes_a_special_token(model: str, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert min(processor.encode(text), default=4) >= 4


def test_megatron_sees_the_special_tokens(model: str) -> None:
    tokenizer = build_core_tokenizer(TokenizerFlags("SentencePieceTokenizer", model))
    assert tokenizer.vocab_size == 400
    assert tokenizer.eod == train_tokenizer.EOD_ID == 2
    assert tokenizer.pad == train_tokenizer.PAD_ID == 3
    assert tokenizer.tokenize("\n\t") == [4 + ord("\n"), 4 + ord("\t")]


@pytest.mark.filterwarnings("error:The pad token id")
def test_megatron_keeps_the_loss_on_the_end_of_document(model: str, tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    builder = IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=np.uint16)
    for _ in range(20):
        builder.add_document(np.array([50, 51, 52, train_tokenizer.EOD_ID]), [4])
    builder.finalize(f"{tmp_path}/d.idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        split="1,0,0",
        path_to_cache=str(tmp_path),
        tokenizer=build_core_tokenizer(TokenizerFlags("SentencePieceTokenizer", model)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    data = IndexedDataset(f"{tmp_path}/d")
    sample = GPTDataset(data, None, np.arange(20), 4, Split.train, config)[0]
    assert (sample["labels"] == train_tokenizer.EOD_ID).sum() == 4
    assert sample["loss_mask"].all()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_input_gives_same_bytes(tmp_path: Path, corpus: Path, model_type: str) -> None:
    digests = set()
    for run in ("a", "b"):
        prefix = tmp_path / run / "tokenizer"
        assert train(
            "--input", corpus, "--output-prefix", prefix, "--vocab-size", 340,
            "--model-type", model_type,
        ) == 0  # fmt: skip
        assert sorted(p.name for p in prefix.parent.iterdir()) == [
            "tokenizer.model",
            "tokenizer.vocab",
        ]
        digests.add(hashlib.sha256(Path(f"{prefix}.model").read_bytes()).hexdigest())
        listing = Path(f"{prefix}.vocab").read_text().splitlines()
        assert len(listing) == 340
        assert listing[:5] == ["<unk>\t0", "<s>\t0", "</s>\t0", "<pad>\t0", "<0x00>\t0"]
    assert len(digests) == 1


def test_json_key_chooses_the_text(tmp_path: Path, corpus: Path) -> None:
    prefix = tmp_path / "t"
    flags = ("--input", corpus, "--output-prefix", prefix, "--vocab-size", 340)
    assert train(*flags) == 0
    of_text = Path(f"{prefix}.model").read_bytes()
    assert train(*flags, "--json-key", "body") == 0
    assert Path(f"{prefix}.model").read_bytes() != of_text


def test_a_big_input_does_not_crowd_out_a_small_one(tmp_path: Path) -> None:
    big = write_jsonl(tmp_path / "big.jsonl", [{"text": "abcdefgh " * 50}] * 400)
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": "zyxwvuts " * 50}] * 10)

    def pieces(max_bytes: int) -> str:
        flags = ("--vocab-size", 290, "--max-bytes", max_bytes, "--output-prefix", tmp_path / "t")
        assert train("--input", big, small, *flags) == 0
        return (tmp_path / "t.vocab").read_text()

    # Merges come in order of frequency: with equal shares both alphabets get theirs.
    assert "zyx" in pieces(9000) or "xwv" in pieces(9000)
    assert "zyx" not in pieces(10**9) or "xwv" not in pieces(10**9)


@given(st.lists(st.integers(0, 1000), min_size=1), st.integers(1, 20000))
def test_even_budgets(sizes: list[int], total: int) -> None:
    budgets = even_budgets(sizes, total)
    assert all(0 <= budget <= size for budget, size in zip(budgets, sizes, strict=True))
    assert sum(budgets) == min(total, sum(sizes))
    capped = [b for b, size in zip(budgets, sizes, strict=True) if b < size]
    if capped:
        assert min(capped) >= max(budgets) - 1  # no input gives more than one that is cut short


@given(st.lists(st.text(max_size=30)), st.floats(0, 1))
def test_spread_sample(sentences: list[str], fraction: float) -> None:
    sizes = [len(sentence.encode()) for sentence in sentences]
    budget = int(sum(sizes) * fraction)
    sample = list(spread_sample(iter(sentences), sum(sizes), budget))
    taken = sum(len(sentence.encode()) for sentence in sample)
    assert budget <= taken + max(sizes, default=0)
    assert taken <= budget + max(sizes, default=0)


def test_spread_sample_takes_from_the_whole_length() -> None:
    sentences = [f"{number:04}" for number in range(1000)]
    sample = list(spread_sample(iter(sentences), 4000, 400))
    assert sample == sentences[0::10]
    assert list(spread_sample(iter(sentences), 4000, 4000)) == sentences


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        ('{"text": "a b"}', ["--vocab-size", "100"], "--vocab-size 100 is too small: "),
        ('{"text": "a b"}', ["--vocab-size", "9999"], "--vocab-size 9999 is too large"),
        ('{"text": "\\n\\t\\n"}', [], "--input: no text to train on"),
        ('{"text": ""}', [], "c.jsonl, line 1: field 'text' (--json-key) is empty"),
        ('{"txt": "a b"}', [], "c.jsonl, line 1: no field 'text' (--json-key); the line has: txt"),
    ],
)
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_bad_input_is_one_clear_error(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    line: str,
    flags: list[str],
    message: str,
    model_type: str,
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    prefix = tmp_path / "out" / "t"
    status = train(
        "--input", path, "--output-prefix", prefix, "--model-type", model_type, *flags
    )  # fmt: skip
    error = capfd.readouterr().err.splitlines()[-1]
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert list(prefix.parent.iterdir()) == []


def test_a_missing_or_foreign_input_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--input", tmp_path / "no.jsonl", "--output-prefix", tmp_path / "t") == 2
    assert "no.jsonl: no such file" in capsys.readouterr().err
    (tmp_path / "c.parquet").write_text("x")
    assert train("--input", tmp_path / "c.parquet", "--output-prefix", tmp_path / "t") == 2
    assert "only .jsonl and .jsonl.gz are read" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["train_tokenizer", "preprocess_data"])
def test_help_imports_nothing_heavy(tool: str) -> None:
    script = f"""
import json, sys
sys.argv = ["x", "--help"]
try:
    import runpy; runpy.run_path("tools/{tool}.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print(json.dumps(sorted(m for m in ("torch", "megatron", "transformers") if m in sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "example:" in done.stdout
