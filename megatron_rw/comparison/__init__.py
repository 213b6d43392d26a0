"""Comparison of ways of training, from what their runs have written.

It needs scipy and, for pictures, matplotlib; both are optional. It imports neither torch nor
Megatron, unless arms have to be named after their `--reweight-*` arguments.
"""
