"""Turns text into Megatron datasets, one per domain; see `--help`."""

from megatron_rw.data.preprocess_data import main

if __name__ == "__main__":
    main()
