"""Running: checkpoints, resuming, digests, logs, guards against bad numbers, the trained encoder.

May import the rest of model. Begin with `checkpoint.py`.
"""
