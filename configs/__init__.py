"""The settings: `schema.py` declares each once, `fixed.py` lists those that a resumed run must keep.

`command_line.py` reads the arguments and the number of ranks, `slurm.py` makes srun's tasks ranks. `derived.py`
prints the settings with the values that follow from them. Each YAML file is a recipe and opens with its claim. May
import files. Begin with `schema.py`.
"""
