"""Tells whether one way of training is better than another; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.comparison.command")
