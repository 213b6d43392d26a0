"""Losses of a checkpoint on every token and document of a dataset; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.scoring.command")
