"""Trains a SentencePiece tokenizer on JSON-lines text; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.data.train_tokenizer")
