"""Trains a SentencePiece tokenizer on JSON-lines text; see `--help`."""

from megatron_rw.data.train_tokenizer import main

if __name__ == "__main__":
    main()
