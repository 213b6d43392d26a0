"""Joins Megatron datasets; see `--help`."""

import sys

from megatron_rw.data.merge_datasets import main

if __name__ == "__main__":
    sys.exit(main())
