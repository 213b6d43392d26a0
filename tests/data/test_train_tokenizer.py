import gzip
import io
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rw.data import train_tokenizer
from megatron_rw.data.tokenizers.library_tokenizer import build_core_tokenizer
from megatron_rw.data.tokenizers.sentencepiece_training import EOD_ID, PAD_ID
from tests.data.conftest import make_texts, write_jsonl, write_texts
from tests.data.datasets import Ended, call, write_dataset
from tests.data.tiny_tokenizers import sentencepiece_flags

# U+2581 is SentencePiece's mark for the space, and the one character that does not survive.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl.gz"
    return write_jsonl(path, [{"text": text, "body": "b" + text} for text in make_texts(200, 1)])


def train(prefix: Path, *flags: object, size: int = 340, status: int = 0) -> Ended:
    given = ("--output-prefix", prefix, "--overwrite", "--vocab-size", size, *flags)
    return call(train_tokenizer.main, *given, status=status)


def trained(prefix: Path, *flags: object) -> bytes:
    """Returns the bytes of a model."""
    train(prefix, *flags)
    return Path(f"{prefix}.model").read_bytes()


@given(TEXTS)
@example("def f(x):\n\tif x:\n        return  '''a\n\n\n'''\n")
@example("  leading, trailing  ")
@example("\r\n\x00\x07 e\u0301 \ufb01 \u3000 \u2585 \u2047 <unk><s></s><pad> </s>")
def test_text_round_trips_and_makes_no_special_token(model: str, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert min(ids, default=4) >= 4


def test_megatron_sees_the_special_tokens(model: str) -> None:
    tokenizer = build_core_tokenizer(sentencepiece_flags(model))
    assert tokenizer.vocab_size == 400
    assert tokenizer.eod == EOD_ID == 2
    assert tokenizer.pad == PAD_ID == 3
    assert tokenizer.tokenize("\n\t") == [4 + ord("\n"), 4 + ord("\t")]


@pytest.mark.filterwarnings("error:The pad token id")
def test_megatron_keeps_the_loss_on_the_end_of_document(model: str, tmp_path: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

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
    data = IndexedDataset(str(write_dataset(tmp_path / "d", [[[50, 51, 52, EOD_ID]]] * 20)))
    sample = GPTDataset(data, None, np.arange(20), 4, Split.train, config)[0]
    assert (sample["labels"] == EOD_ID).sum() == 4
    assert sample["loss_mask"].all()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_input_gives_same_bytes_and_another_key_others(
    tmp_path: Path, corpus: Path, model_type: str
) -> None:
    flags = ("--input", corpus, "--model-type", model_type, "--json-key")
    models = [trained(tmp_path / key / "t", *flags, key) for key in ("text", "text", "body")]
    assert models[0] == models[1] != models[2]
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["t.model"]
    listing = pieces(tmp_path / "text" / "t.model")
    assert len(listing) == 340
    assert listing[:5] == ["<unk>", "<s>", "</s>", "<pad>", "<0x00>"]


def pieces(model: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [processor.id_to_piece(id_) for id_ in range(processor.get_piece_size())]


def shares(folder: Path, *flags: object) -> dict[str, float]:
    """Trains, and returns the percentages of the domains that it tells of."""
    told = train(folder / "t", *flags, size=285).err
    found = re.findall(r"^train_tokenizer:   (\S+): .* MB, (\S+)%", told, re.M)
    return {domain: float(share) for domain, share in found}


def test_domains_give_the_same(tmp_path: Path) -> None:
    # Two domains, by file name and by field, of documents that share no letter.
    big = [{"text": "abcdefgh " * 50, "domain": "b"}] * 200
    small = [{"text": "zyxwvuts " * 50, "domain": "s"}] * 50
    for name, records in (("big.1.jsonl", big), ("big.2.jsonl.gz", big), ("small.jsonl", small)):
        write_jsonl(tmp_path / "in" / name, records)
    flags = ("--input", tmp_path / "in", "--max-bytes", 30_000)

    assert shares(tmp_path, *flags) == pytest.approx({"big": 50, "small": 50}, abs=5)
    # Merges come in order of frequency: with equal shares both alphabets get theirs.
    listing = pieces(tmp_path / "t.model")
    assert any(re.fullmatch("[a-h]{2,}", piece) for piece in listing)
    assert any(re.fullmatch("[s-z]{2,}", piece) for piece in listing)
    by_field = shares(tmp_path, *flags, "--domain-key", "domain")
    assert by_field == pytest.approx({"b": 50, "s": 50}, abs=5)
    assert shares(tmp_path, *flags, "--domain-by", "directory") == {"in": 100}


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_special_token_is_one_id_wherever_it_stands(
    tmp_path: Path, corpus: Path, model_type: str
) -> None:
    special = ["<|im_start|>", "<|im_end|>", "a,b", '"q"', "é"]
    flags = ("--input", corpus, "--model-type", model_type)
    train(tmp_path / "t", *flags, "--special-tokens", *special)
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


def test_files_of_text_give_what_lines_give(tmp_path: Path) -> None:
    texts = make_texts(200, 1)
    write_texts(tmp_path / "lines" / "d" / "c.jsonl.gz", texts)
    (tmp_path / "plain" / "d").mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / "plain" / "d" / f"{number:03}.txt").write_text(text)
    flags = ("--max-bytes", 20_000, "--domain-by", "directory", "--input")
    lines, plain = (trained(tmp_path / "t", *flags, tmp_path / f / "d") for f in ("lines", "plain"))
    assert lines == plain


def test_standard_input_is_json_lines(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.BytesIO(gzip.decompress(corpus.read_bytes()))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines))
    made = trained(tmp_path / "t", "--input", "-")
    assert made == trained(tmp_path / "t", "--input", corpus)


def test_a_few_bad_lines_are_left_out_and_told(tmp_path: Path, corpus: Path) -> None:
    path, prefix = tmp_path / "c.jsonl", tmp_path / "t"
    path.write_bytes(gzip.decompress(corpus.read_bytes()) + b"no json\n")
    assert "c.jsonl: Expecting value" in train(prefix, "--input", path, status=2).error
    told = train(prefix, "--input", path, "--max-bad-fraction", 0.01).err
    assert "left out 1 bad lines" in told
    without = Path(f"{prefix}.model").read_bytes()
    assert without == trained(prefix, "--input", corpus)
