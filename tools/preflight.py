"""Looks at every rank before a long job, with the job's own flags; see `--help`."""

from _start import start

if __name__ == "__main__":
    start("megatron_rw.preflight.command")
