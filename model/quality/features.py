"""Features of a frozen encoder, and batch-norm calibration of an untrained one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def extract_features(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features of every image in eval mode; the encoder's mode is restored.

    Args:
        encoder: images (N, 3, H, W) -> (N, F).
        batches: pairs of images and labels (N,).

    Returns:
        features (M, F) float32 and labels (M,) int64, on the encoder's device, in the order of the batches. Without a
        batch M is 0 and F the encoder's num_features: a rank that has no image goes on with the others.
    """
    device = next(encoder.parameters()).device
    modes = _modes(encoder)
    encoder.eval()
    try:
        pairs = [(encoder(images.to(device)).float(), labels.to(device)) for images, labels in batches]
    finally:
        _restore_modes(modes)
    if not pairs:
        width = int(encoder.num_features)  # type: ignore[arg-type]
        return torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    features, labels = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(labels).long()


@torch.no_grad()
def calibrate_batch_norm(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace the running statistics of every batch norm by their plain average over the batches.

    Parameters, modes and momenta stay as they are. It makes an untrained encoder, whose running statistics
    are still 0 and 1, comparable with a trained one.

    Args:
        encoder: a module with batch-norm layers.
        batches: pairs of images (N, 3, H, W) and labels, as for `extract_features`; labels are not used.
    """
    device = next(encoder.parameters()).device
    norms = [layer for layer in encoder.modules() if isinstance(layer, _BatchNorm)]
    modes, momenta = _modes(encoder), [norm.momentum for norm in norms]
    encoder.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    try:
        for images, _ in batches:
            encoder(images.to(device))
    finally:
        _restore_modes(modes)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(layer, layer.training) for layer in module.modules()]


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for layer, training in modes:
        layer.training = training
