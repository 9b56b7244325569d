"""Byte formats: tar, .beton, encoded images, folders. Imports no other part of pipelines.

`encoded.py` checks one image and `decode.py` decodes it; `index.py` lists the samples of one shard (`tar.py`,
`beton.py`); `folder.py`, `beton.py` and `synthetic.py` are sources without a manifest. Begin with `encoded.py`.
"""
