"""Parts of `tools/evaluate.py`: the protocols, and what they share. Begin with `program.py`."""
