"""Losses of a checkpoint on every token of a dataset: tools/score_dataset.py.

`plan`, `folder` and `summary` need neither torch nor Megatron; `scorer` runs the model.
"""
