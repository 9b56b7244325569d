"""The settings: `schema.py` declares each once, `fixed.py` lists those that a resumed run must keep.

`command_line.py` reads the arguments and the number of ranks, `slurm.py` makes srun's tasks ranks. `derived.py` chooses
the values of auto settings and prints the config, `estimate.py` its memory and time. Each YAML file is a recipe and
opens with its claim; `lists/` has variants of recipes for tools/ablate.py. May import files. Begin with `schema.py`.
"""
