"""The method, in the words of the paper. May import configs and files, never pipelines.

`run/` keeps a run alive, `quality/` judges an encoder. Begin with `byol.py`, then `step.py`.
"""
