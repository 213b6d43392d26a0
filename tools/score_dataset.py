"""Losses of a checkpoint on every token and document of a dataset; see `--help`."""

from megatron_rw.scoring.command import main

if __name__ == "__main__":
    main()
