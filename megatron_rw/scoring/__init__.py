"""Losses of a checkpoint on every token of a dataset: tools/score_dataset.py.

`command` and `config` read the command line, and `job` checks it and is the run. `plan` cuts
datasets into blocks and rows, `scorer` runs the model over them, `folder` is what is written,
`summary` what is printed.
"""
