"""Trains a SentencePiece tokenizer on JSON-lines text.

The model keeps every character: no Unicode normalisation, no folding of white space, no dummy
prefix, and bytes for characters outside the vocabulary, so that code decodes to itself. The one
exception is U+2581, SentencePiece's own mark for the space: it decodes to a space.

Newlines, tabs and other control characters are byte tokens and never part of a longer piece: the
text is trained line by line, and SentencePiece reserves the tab.

Token ids: 0 `<unk>`, 1 `<s>`, 2 `</s>` (Megatron's end of document), 3 `<pad>`, 4-259 the bytes,
then the learnt pieces. Padding has an id of its own because core's GPTDataset takes the loss off
every label that equals it; were it the end of document, documents would never learn to end. These
four are control symbols: no text encodes to them.
"""

import argparse
import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rw.data.command import InputError, exit_status
from megatron_rw.data.jsonl import check_inputs, read_texts

UNK_ID, BOS_ID, EOD_ID, PAD_ID = range(4)

# Characters that no piece may hold: line ends and other control characters, which the .vocab file
# could not show; the tab and U+2585, for which SentencePiece would drop the whole line; U+2581, its
# mark for the space.
_NOT_IN_PIECES = re.compile("[\x00-\x1f\u2581\u2585]+")
# SentencePiece drops lines of more than 4192 bytes; 1000 characters are never more than 4000.
_MAX_CHARACTERS = 1000

_EXAMPLE = """\
example:
  python tools/train_tokenizer.py --input corpus/*.jsonl.gz --output-prefix tokenizer/bpe8k \\
      --vocab-size 8192
  writes tokenizer/bpe8k.model, for --tokenizer-type SentencePieceTokenizer
  --tokenizer-model tokenizer/bpe8k.model, and tokenizer/bpe8k.vocab, which lists the pieces.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parse(argv)
    return exit_status(lambda: _run(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        description="Train a SentencePiece tokenizer on JSON-lines text. The same inputs and "
        "flags give the same bytes.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl or .jsonl.gz files",
    )
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="field that holds the text (text)"
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.model and PREFIX.vocab, replacing what is there",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32000, metavar="N", help="number of token ids (32000)"
    )
    parser.add_argument(
        "--model-type", choices=["bpe", "unigram"], default="bpe", help="algorithm (bpe)"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=500_000_000,
        metavar="N",
        help="UTF-8 bytes of text to train on (500000000); if the inputs hold more, each gives "
        "the same amount, spread over its whole length, and one too small for that gives all",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=8,
        metavar="N",
        help="training threads (8); part of what makes the bytes the same, so not taken from "
        "the machine",
    )
    args = parser.parse_args(argv)
    for flag in ("vocab_size", "max_bytes", "threads"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    return args


def _run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    check_inputs(args.input)
    prefix = Path(args.output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)

    sizes = [sum(map(_size, _sentences(path, args.json_key))) for path in args.input]
    budgets = even_budgets(sizes, args.max_bytes)
    _say(
        f"training {args.model_type}, {args.vocab_size} pieces, on {sum(budgets) / 1e6:.1f} MB "
        f"of {sum(sizes) / 1e6:.1f} MB of text in {len(sizes)} files"
    )
    sample = (
        sentence
        for path, size, budget in zip(args.input, sizes, budgets, strict=True)
        for sentence in spread_sample(_sentences(path, args.json_key), size, budget)
    )
    model = _train(sample, args.vocab_size, args.model_type, args.threads)

    _write(Path(f"{prefix}.vocab"), _vocabulary_listing(model).encode())
    _write(Path(f"{prefix}.model"), model)
    _say(f"wrote {prefix}.model and {prefix}.vocab in {time.monotonic() - started:.1f} s")


def even_budgets(sizes: Sequence[int], total: int) -> list[int]:
    """Divides a budget over the inputs as evenly as their sizes allow.

    Every input gets the same amount; one that is smaller gives all it has, and the others share
    what it leaves.

    Args:
        sizes: What each input holds, in bytes.
        total: What may be taken from all of them together, in bytes.

    Returns:
        What to take from each, at most its size.
    """
    budgets = [0] * len(sizes)
    left = total
    smallest_first = sorted(range(len(sizes)), key=sizes.__getitem__)
    for rank, index in enumerate(smallest_first):
        budgets[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= budgets[index]
    return budgets


def spread_sample(sentences: Iterator[str], size: int, budget: int) -> Iterator[str]:
    """Takes about `budget` of `size` bytes, spread evenly over the whole, without chance.

    A sentence is taken whenever the sample has fallen behind its share of what has gone by. Its
    own length plays no part in that, so long ones are not avoided; the last may go over budget.

    Args:
        sentences: All sentences.
        size: Their UTF-8 bytes together.
        budget: Bytes to take, at most `size`.
    """
    seen = taken = 0
    for sentence in sentences:
        length = _size(sentence)
        seen += length
        if taken * size < budget * seen:
            taken += length
            yield sentence


def _sentences(path: Path, key: str) -> Iterator[str]:
    """Yields the pieces of text that SentencePiece is to see as lines."""
    for text in read_texts([path], key):
        for line in _NOT_IN_PIECES.split(text):
            for start in range(0, len(line), _MAX_CHARACTERS):
                yield line[start : start + _MAX_CHARACTERS]


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _train(sentences: Iterator[str], vocab_size: int, model_type: str, threads: int) -> bytes:
    """Returns the bytes of the trained model."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=threads,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOD_ID,
            pad_id=PAD_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    """Turns SentencePiece's message into one that names our flag and the remedy."""
    if "!sentences_.empty()" in message:
        return "--input: no text to train on"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: the 260 fixed tokens and the characters "
            f"of this text alone are {too_small[1]}; give more than that"
        )
    if too_large := re.search(r"size too high .*<= (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too large for so little text: give at most "
            f"{too_large[1]}, or more text"
        )
    return f"SentencePiece could not train: {message}"


def _vocabulary_listing(model: bytes) -> str:
    """Returns SentencePiece's `.vocab` format: a line of piece, tab and score for each id."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return "".join(
        f"{processor.id_to_piece(id_)}\t{processor.get_score(id_):g}\n"
        for id_ in range(processor.get_piece_size())
    )


def _write(path: Path, content: bytes) -> None:
    """Writes a file that is complete whenever it exists under its name."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _say(message: str) -> None:
    print(f"train_tokenizer: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
