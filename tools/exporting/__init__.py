"""Parts of `tools/export.py`: the files for each library, their check, the model card. Begin with `libraries.py`."""
