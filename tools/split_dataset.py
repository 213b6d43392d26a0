"""Splits Megatron datasets into train, valid and test; see `--help`."""

from megatron_rw.data.split_dataset import main

if __name__ == "__main__":
    main()
