"""Parts of `tools/ablate.py`: the list of ablations, and the table and curves of runs. Begin with `recipes.py`."""
