"""A run: its state, checkpoints, resuming, digests, logs, guards against bad numbers, the trained encoder.

May import the rest of model. Begin with `run.py`, which the loop of train.py calls.
"""
