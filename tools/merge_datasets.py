"""Joins Megatron datasets; see `--help`."""

from megatron_rw.data.merge_datasets import main

if __name__ == "__main__":
    main()
