"""Fused kernels of the training step. May import model/distributed.py, nothing else of the project.

Tests compare each file of Triton kernels with a definition in torch: `norm_triton.py` with `norm.py` (batch norm,
shortcut, ReLU), `lars_triton.py` with `model/optim.py`.
"""
