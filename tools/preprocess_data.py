"""Turns text into Megatron datasets, one per domain; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.data.preprocess_data")
