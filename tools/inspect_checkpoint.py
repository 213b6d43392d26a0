"""Prints what is in a checkpoint and whether it is intact; see `--help`."""

import sys

from megatron_rw.resilience.inspect_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
