"""Prints what is in Megatron datasets and whether they are whole; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.data.inspect_dataset")
