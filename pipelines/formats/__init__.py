"""Byte formats: tar, .beton, encoded images, folders. Imports no other part of pipelines.

`encoded.py` checks the header of an image, `proof.py` its pixels, and `decode.py` decodes it; `index.py` lists the
samples of one shard (`tar.py`, `beton.py`); `folder.py`, `beton.py` (with `beton_index.py`) and `synthetic.py` are
sources without a manifest. Begin with `encoded.py`.
"""
