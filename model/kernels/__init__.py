"""Fused kernels of the training step. May import torch and Triton, nothing else of the project.

Tests compare each file of Triton kernels with a definition in torch: `lars_triton.py` with `model/optim.py`.
"""
