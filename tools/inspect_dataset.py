"""Prints what is in Megatron datasets and whether they are whole; see `--help`."""

import sys

from megatron_rw.data.inspect_dataset import main

if __name__ == "__main__":
    sys.exit(main())
