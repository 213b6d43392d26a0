"""Looks at every rank before a long job, with the job's own flags; see `--help`."""

from megatron_rw.preflight.command import main

if __name__ == "__main__":
    main()
