"""Training data: domain labels, and the tools that turn text into Megatron datasets.

Nothing here imports torch or megatron at import time, so that `--help` answers at once and the
domain labels can be read anywhere.
"""
