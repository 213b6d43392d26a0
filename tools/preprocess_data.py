"""Turns JSON-lines text into Megatron datasets, one per domain; see `--help`."""

import sys

from megatron_rw.data.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
