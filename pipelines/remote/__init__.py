"""Data sets in object storage or behind HTTP: read by ranges, kept in a cache on local disk, uploaded.

`urls.py` parses what users write; `store.py`, the one file that imports obstore, reads and writes the objects of one
folder and repeats failed requests by the rules of `retry.py`; `cache.py` keeps files below a limit; `dataset.py` finds
and stages a data set; `source.py` reads its samples. Imports manifest and formats. Begin with `source.py`.
"""
