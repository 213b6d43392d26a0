"""Prints what is in a checkpoint and whether it is intact; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.resilience.inspect_checkpoint")
