import argparse
import gzip
import io
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rw.data import train_tokenizer
from megatron_rw.data.tokenizers.core_tokenizer import build_core_tokenizer
from megatron_rw.data.tokenizers.sentencepiece_training import EOD_ID, PAD_ID, check_special_tokens
from megatron_rw.data.train_tokenizer import padded_vocab_size
from megatron_rw.errors import UserError
from tests.data.conftest import make_texts, write_jsonl
from tests.data.datasets import exit_status
from tests.data.tiny_tokenizers import sentencepiece_flags

# U+2581 is SentencePiece's mark for the space, and the one character that does not survive.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl.gz"
    return write_jsonl(path, [{"text": text, "body": "b" + text} for text in make_texts(200, 1)])


def train(*flags: object) -> int:
    return exit_status(train_tokenizer.main, *flags)


@given(TEXTS)
@example("def f(x):\n\tif x:\n        return  '''a\n\n\n'''\n")
@example("  leading, trailing  ")
@example("\r\n\x00\x07 e\u0301 \ufb01 \u3000 \u2585 \u2047 <pad> </s>")
def test_text_round_trips(model: str, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert processor.decode(processor.encode(text)) == text


@given(TEXTS)
@example("<unk><s></s><pad>")
def test_no_text_makes_a_special_token(model: str, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert min(processor.encode(text), default=4) >= 4


def test_megatron_sees_the_special_tokens(model: str) -> None:
    tokenizer = build_core_tokenizer(sentencepiece_flags(model))
    assert tokenizer.vocab_size == 400
    assert tokenizer.eod == EOD_ID == 2
    assert tokenizer.pad == PAD_ID == 3
    assert tokenizer.tokenize("\n\t") == [4 + ord("\n"), 4 + ord("\t")]


@pytest.mark.filterwarnings("error:The pad token id")
def test_megatron_keeps_the_loss_on_the_end_of_document(model: str, tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    builder = IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=np.uint16)
    for _ in range(20):
        builder.add_document(np.array([50, 51, 52, EOD_ID]), [4])
    builder.finalize(f"{tmp_path}/d.idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        split="1,0,0",
        path_to_cache=str(tmp_path),
        tokenizer=build_core_tokenizer(sentencepiece_flags(model)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    data = IndexedDataset(f"{tmp_path}/d")
    sample = GPTDataset(data, None, np.arange(20), 4, Split.train, config)[0]
    assert (sample["labels"] == EOD_ID).sum() == 4
    assert sample["loss_mask"].all()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_input_gives_same_bytes_and_another_key_others(
    tmp_path: Path, corpus: Path, model_type: str
) -> None:
    models = []
    for run, key in (("a", "text"), ("b", "text"), ("c", "body")):
        prefix = tmp_path / run / "tokenizer"
        assert train(
            "--input", corpus, "--output-prefix", prefix, "--vocab-size", 340,
            "--model-type", model_type, "--json-key", key,
        ) == 0  # fmt: skip
        models.append(Path(f"{prefix}.model").read_bytes())
        listing = Path(f"{prefix}.vocab").read_text().splitlines()
        assert len(listing) == 340
        assert listing[:5] == ["<unk>\t0", "<s>\t0", "</s>\t0", "<pad>\t0", "<0x00>\t0"]
        assert len(list(prefix.parent.iterdir())) == 2
    assert models[0] == models[1] != models[2]


@pytest.fixture
def two_alphabets(tmp_path: Path) -> list[Path]:
    """Two domains, by file name and by field, of 400 and 50 documents that share no letter."""
    big = [{"text": "abcdefgh " * 50, "domain": "b"}] * 400
    small = [{"text": "zyxwvuts " * 50, "domain": "s"}] * 50
    return [
        write_jsonl(tmp_path / "big.1.jsonl", big[:200]),
        write_jsonl(tmp_path / "big.2.jsonl.gz", big[200:]),
        write_jsonl(tmp_path / "small.jsonl", small),
    ]


def shares(capfd: pytest.CaptureFixture[str], *flags: object) -> dict[str, float]:
    """Trains, and returns the percentages of the domains that it tells of."""
    capfd.readouterr()
    assert train("--vocab-size", 285, *flags) == 0
    found = re.findall(r"^train_tokenizer:   (\S+): .* MB, (\S+)%", capfd.readouterr().err, re.M)
    return {domain: float(share) for domain, share in found}


def test_domains_give_the_same_or_their_weight_or_their_share(
    tmp_path: Path, two_alphabets: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--input", *two_alphabets, "--output-prefix", tmp_path / "t", "--max-bytes", 30_000]

    def close(big: float) -> object:
        return pytest.approx({"big": big, "small": 100 - big}, abs=5)

    assert shares(capfd, *flags) == close(50)
    # Merges come in order of frequency: with equal shares both alphabets get theirs.
    listing = (tmp_path / "t.vocab").read_text()
    assert re.search("^[a-h]{2,}\t", listing, re.M)
    assert re.search("^[s-z]{2,}\t", listing, re.M)
    assert shares(capfd, *flags, "--domain-weights", "big=1", "small=4") == close(20)
    assert shares(capfd, *flags, "--sample", "proportional") == pytest.approx(
        {"big": 89, "small": 11}, abs=10
    )
    assert shares(capfd, *flags, "--domain-weights", "big=0", "small=4") == {"small": 100}
    by_field = shares(capfd, *flags, "--domain-key", "domain", "--domain-weights", "b=4", "s=1")
    assert by_field == pytest.approx({"b": 80, "s": 20}, abs=5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{big}=1", "--domain-weights: none for domain '{small}' of "),
        ("{big}=1 {small}=1 x=0", "--domain-weights: no domain 'x' in --input, which has"),
        ("{big}=1 {big}=2", "--domain-weights: {big}=2: {big} is given twice"),
        ("{big}=1 {small}", "--domain-weights: {small}: give DOMAIN=WEIGHT"),
        ("{big}=nan", "--domain-weights: {big}=nan: give DOMAIN=WEIGHT"),
        ("{big}=0 {small}=0", "--domain-weights: give a weight that is more than 0"),
    ],
)
def test_wrong_weights_are_an_error(
    tmp_path: Path,
    two_alphabets: list[Path],
    capfd: pytest.CaptureFixture[str],
    weights: str,
    message: str,
) -> None:
    flags = ["--input", *two_alphabets, "--output-prefix", tmp_path / "t"]
    by_name, by_field = {"big": "big", "small": "small"}, {"big": "b", "small": "s"}
    for names, more in ((by_name, []), (by_field, ["--domain-key", "domain"])):
        given = weights.format(**names).split()
        assert train(*flags, *more, "--domain-weights", *given) == 2
        assert message.format(**names) in capfd.readouterr().err
    assert not list(tmp_path.glob("t.*"))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_special_token_is_one_id_wherever_it_stands(
    tmp_path: Path, corpus: Path, model_type: str
) -> None:
    special = ["<|im_start|>", "<|im_end|>", "a,b", '"q"', "é"]
    assert train(
        "--input", corpus, "--output-prefix", tmp_path / "t", "--vocab-size", 340,
        "--model-type", model_type, "--special-tokens", *special,
    ) == 0  # fmt: skip
    model = f"{tmp_path}/t.model"
    tokenizer = build_core_tokenizer(sentencepiece_flags(model))
    assert tokenizer.vocab_size == 340
    for id_, token in enumerate(special, start=4):
        assert tokenizer.tokenize(token) == [id_]
        assert tokenizer.tokenize(f"the{token}model {token}\n").count(id_) == 2
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    text = "<|im_start|>user\n  é a,b<|im_end|> <s>"
    assert processor.decode(processor.encode(text)) == text
    assert min(processor.encode("<unk><s></s><pad>")) >= 4


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([""], "--special-tokens '': it is empty"),
        (["<|a b|>"], "--special-tokens '<|a b|>': white space"),
        (["<|a\u2581|>"], "white space and control characters"),
        (["</s>"], "--special-tokens '</s>': every model has it already"),
        (["<0x0A>"], "--special-tokens '<0x0A>': every model has it already"),
        (["<x>", "<x>"], "--special-tokens '<x>': it is given twice"),
    ],
)
def test_what_cannot_be_a_special_token_is_an_error(tokens: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_special_tokens(tokens)


@given(st.integers(1, 300_000), st.integers(1, 512), st.integers(1, 64))
def test_padding_is_megatrons(vocab_size: int, divisible_by: int, tensor_parallel: int) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    args = argparse.Namespace(
        make_vocab_size_divisible_by=divisible_by,
        tensor_model_parallel_size=tensor_parallel,
        rank=1,
    )
    ours = padded_vocab_size(vocab_size, divisible_by, tensor_parallel)
    assert ours == vocab_size_with_padding(vocab_size, args)


def test_a_vocabulary_takes_the_place_of_padding(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--input", corpus, "--output-prefix", tmp_path / "t", "--vocab-size", 340)
    for more, size, padding in (
        ("", 340, "pads 340 token ids to 384 at --make-vocab-size-divisible-by 128 "),
        ("--tensor-model-parallel-size 3", 384, "--tensor-model-parallel-size 3: 0 rows"),
        (
            "--make-vocab-size-divisible-by 40 --tensor-model-parallel-size 3",
            360,
            "pads 360 token ids to 360 at --make-vocab-size-divisible-by 40",
        ),
    ):
        assert train(*flags, *more.split()) == 0
        assert padding in capfd.readouterr().err
        assert sentencepiece.SentencePieceProcessor(f"{tmp_path}/t.model").vocab_size() == size


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        ('{"text": "a b"}', "--vocab-size 100", "--vocab-size 100 is too small: "),
        ('{"text": "a b"}', "--vocab-size 9999", "--vocab-size 9999 is too large"),
        ('{"text": "a b"}', "--model-type unigram --vocab-size 100", "--vocab-size 100 is too sma"),
        (
            '{"text": "a b"}',
            "--model-type unigram --vocab-size 9999",
            "--vocab-size 9999 is too la",
        ),
        ('{"text": "\\n\\t\\n"}', "", "--input: no text to train on"),
        ('{"text": ""}', "", "c.jsonl, line 1: field 'text' (--json-key) is empty"),
        ('{"txt": "a b"}', "", "c.jsonl, line 1: no field 'text' (--json-key); it has: txt"),
        ("", "--max-bytes 9", "--max-bytes 9: give a number of at least 10000"),
        ("", "--max-bad-fraction 2", "--max-bad-fraction 2.0: give a number from 0 to 1"),
        ("", "--sample even --domain-weights a=1", "--domain-weights"),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, flags: str, message: str
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    assert train("--input", path, "--output-prefix", tmp_path / "t", *flags.split()) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == [path]


def test_any_format_gives_the_same(tmp_path: Path) -> None:
    texts = make_texts(200, 1)
    for folder in ("lines", "rows", "plain"):
        (tmp_path / folder / "d").mkdir(parents=True)
    write_jsonl(tmp_path / "lines" / "d" / "c.jsonl.gz", [{"text": text} for text in texts])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "rows" / "d" / "c.parquet", row_group_size=7
    )
    for number, text in enumerate(texts):
        (tmp_path / "plain" / "d" / f"{number:03}.txt").write_text(text)
    models = set()
    for folder in ("lines", "rows", "plain"):
        flags = ("--vocab-size", 340, "--max-bytes", 20_000, "--domain-by", "directory")
        prefix = tmp_path / folder / "t"
        assert train("--input", tmp_path / folder / "d", "--output-prefix", prefix, *flags) == 0
        models.add(Path(f"{prefix}.model").read_bytes())
    assert len(models) == 1


def test_standard_input_is_json_lines(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--vocab-size", "340", "--output-prefix"]
    lines = io.BytesIO(gzip.decompress(corpus.read_bytes()))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines))
    assert train("--input", "-", *flags, tmp_path / "a", "--domain-weights", "stdin=1") == 0
    assert train("--input", corpus, *flags, tmp_path / "b", "--domain-weights", "c=1") == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_a_few_bad_lines_are_left_out_and_told(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(gzip.decompress(corpus.read_bytes()) + b"no json\n")
    flags = ["--output-prefix", tmp_path / "t", "--vocab-size", 340]
    assert train("--input", path, *flags) == 2
    assert "c.jsonl, line 201: Expecting value" in capfd.readouterr().err
    assert train("--input", path, *flags, "--max-bad-fraction", 0.01) == 0
    assert "left out 1 bad lines; the first is" in capfd.readouterr().err
    without = Path(f"{tmp_path}/t.model").read_bytes()
    assert train("--input", corpus, *flags) == 0
    assert Path(f"{tmp_path}/t.model").read_bytes() == without
