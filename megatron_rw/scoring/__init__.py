"""Losses of a checkpoint on every token of a dataset: tools/score_dataset.py.

`command` and `config` read the command line, `refusals` checks it, and `job` is the run. `plan`
cuts datasets into blocks and rows, `scorer` runs the model over them, `folder` and `record` are
what is written, `summary` what is printed.
"""
