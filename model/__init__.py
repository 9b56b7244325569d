"""The method, in the words of the paper: networks, loss, optimizer, training step.

May import configs and files, never pipelines. Begin with `byol.py`, then `step.py`. `run/` keeps a run alive,
`quality/` judges an encoder, `kernels/` fuses operations of the step.
"""
