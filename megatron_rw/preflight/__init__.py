"""Looks at every rank before a long job: what differs, what is missing, what is slow, what fits.

`command` is the program, `meeting` brings the ranks together, `facts` and `measure` find things out
on each, `estimate` asks Megatron's formulas, `findings` judges, `table` prints.
"""
