"""Object storage: the objects of one remote folder, and the copy of a local folder there.

`store.py`, the one file that imports obstore, lists, reads, writes and removes objects, and repeats failed requests by
the rules of `retry.py`. `mirror.py` copies a run's files in the background. Begin with `store.py`.
"""
