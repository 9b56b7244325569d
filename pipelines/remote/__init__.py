"""Data sets in object storage or behind HTTP: read by ranges, kept in a cache on local disk.

`urls.py` parses what users write; `cache.py` keeps files below a limit; `dataset.py` finds and stages a data set;
`source.py` reads its samples. Imports manifest and formats; requests go through files.storage. Begin with `source.py`.
"""
