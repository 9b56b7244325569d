"""Making shards: from a folder, tar, zip or other shards to a data set with a manifest.

`from_files.py` and `from_shards.py` list the inputs, `rules.py` says what becomes of an odd image, `plan.py` divides
the work, `shard_writer.py` does it. Begin with `plan.py`.
"""
