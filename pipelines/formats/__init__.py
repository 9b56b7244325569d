"""How bytes are laid out: tar, .beton, encoded images, folders. Imports no other part of pipelines.

Begin with `encoded.py` (one image) and `index.py` (the samples of one shard).
"""
