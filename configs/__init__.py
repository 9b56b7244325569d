"""The settings: `schema.py` declares each once, `fixed.py` lists those that a resumed run must keep.

`derived.py` prints them with the values that follow from them. Each YAML file is a recipe and opens with its claim.
May import files. Begin with `schema.py`.
"""
