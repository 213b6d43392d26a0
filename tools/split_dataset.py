"""Splits Megatron datasets into train, valid and test; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.data.split_dataset")
