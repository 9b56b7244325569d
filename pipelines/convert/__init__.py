"""Makes shards: from a folder, tar, zip or other shards to a data set with a manifest. Imports the rest of pipelines.

Begin with `make.py`, which runs a conversion: `from_files.py` and `from_shards.py` list the inputs, `plan.py` assigns
them to shards, `shard_writer.py` writes one by the rules of `rules.py`. `verify.py` reads a data set again.
"""
