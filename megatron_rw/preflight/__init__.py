"""Looks at every rank before a long job: what differs and what is missing.

`command` is the program and `rank` the order of its checks. `messages` lets ranks exchange what
`facts` and `collectives` find out, and `report` judges and prints it.
"""
