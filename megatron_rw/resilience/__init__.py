"""Keeps long runs alive: complete checkpoints, signals, bad numbers, missing ranks.

This is what Megatron lacks, hooked into its training program.
"""
