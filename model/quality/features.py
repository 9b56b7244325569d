"""Extracts features of a frozen encoder, and calibrates the batch norm of an untrained one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def extract_features(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Extracts features of pairs of images (N, 3, H, W) and labels (N,) in eval mode; restores the encoder's mode.

    Returns:
        Features (M, F) float32 and labels (M,) int64, on the encoder's device, in the order of the batches. A rank
        without batches gets M = 0 and F = encoder.num_features.
    """
    device = next(encoder.parameters()).device
    with _eval_mode(encoder):
        pairs = [(encoder(images.to(device)).float(), labels.to(device)) for images, labels in batches]
    if not pairs:
        width = int(encoder.num_features)  # type: ignore[arg-type]
        return torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    features, labels = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(labels).long()


@torch.no_grad()
def calibrate_batch_norm(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replaces the running statistics of every batch norm by their average over the batches.

    It makes an untrained encoder, whose running statistics are still 0 and 1, comparable with a trained one.
    Parameters, modes and momenta stay unchanged. The labels of the batches are not used.
    """
    device = next(encoder.parameters()).device
    norms = [layer for layer in encoder.modules() if isinstance(layer, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with _eval_mode(encoder):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's cumulative average
            norm.train()
        try:
            for images, _ in batches:
                encoder(images.to(device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Sets eval mode within the block; restores the mode of every layer after it."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
