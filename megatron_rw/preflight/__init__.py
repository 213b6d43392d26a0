"""Looks at every rank before a long job: what differs, what is missing and whether the job fits.

`command` is the program and `rank` the order of its checks. `messages` lets ranks exchange what
`facts` and `collectives` find out, `report` judges and prints it, and `estimate` asks Megatron's
formulas.
"""
