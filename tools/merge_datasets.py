"""Joins Megatron datasets; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.data.merge_datasets")
