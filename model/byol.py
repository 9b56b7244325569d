"""Bootstrap Your Own Latent (arXiv 2006.07733): encoder, projector, predictor; online and target network."""

import copy
import math
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from configs.schema import ModelConfig

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnet8")
STEMS = ("imagenet", "cifar")


class Predictions(NamedTuple):
    """The online network on one batch: predictions (N, D) of both views, features (N, F) of the first."""

    prediction1: Tensor
    prediction2: Tensor
    features1: Tensor  # detached: for a linear probe or a gauge, never for the loss


class ResNet8(nn.Module):
    """The CIFAR residual net of He et al. (arXiv 1512.03385, sec. 4.2) with n = 1, twice as wide: 32-64-128.

    0.31 M parameters. Attributes are named as in torchvision's ResNet; shortcuts that change shape are 1x1
    convolutions (option B) as in torchvision's blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(32, 32))
        self.layer2 = nn.Sequential(BasicBlock(32, 64, stride=2, downsample=_shortcut(32, 64)))
        self.layer3 = nn.Sequential(BasicBlock(64, 128, stride=2, downsample=_shortcut(64, 128)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, 128)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _shortcut(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=2, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class MLP(nn.Sequential):
    """Projector and predictor: Linear(bias) -> BatchNorm -> ReLU -> Linear(no bias) (paper, sec. 3.3)."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_features, bias=False),
        )
        initialise_(self)


def make_encoder(backbone: str, stem: str) -> nn.Module:
    """A torchvision backbone with random weights and without its classifier.

    Args:
        backbone: one of BACKBONES. The ResNets are v1.5: a bottleneck strides in its 3x3 convolution.
        stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no max-pool; SimCLR,
            arXiv 2002.05709, App. B.9).

    Returns:
        A module with the attribute `num_features`: images (N, 3, H, W) -> (N, num_features) after global
        average pooling. Keys of its state_dict are torchvision's without `fc.*`.

    Raises:
        ValueError: backbone or stem is unknown.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone {backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
    if stem not in STEMS:
        raise ValueError(f"stem {stem!r} is unknown; choose one of {', '.join(STEMS)}")
    encoder = ResNet8() if backbone == "resnet8" else torchvision.models.get_model(backbone, weights=None)
    encoder.num_features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(
            3, encoder.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False
        )
        encoder.maxpool = nn.Identity()
    return initialise_(encoder)


def initialise_(module: nn.Module) -> nn.Module:
    """The reference's initialisation, in place (haiku's defaults, which DeepMind's `byol/` keeps).

    Weights of convolutions and linear layers: normal of standard deviation 1/sqrt(fan in), cut at two of
    them; biases 0; batch norm 1 and 0, except 0 for the last scale of a bottleneck (not of a basic block).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            deviation = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, Bottleneck):
            nn.init.zeros_(layer.bn3.weight)  # type: ignore[arg-type]
    return module


class Online(nn.Module):
    """The online network theta: encoder, projector and predictor. Trained by gradient."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(self, view1: Tensor, view2: Tensor) -> Predictions:
        """Both views in one call (one reduction under DDP), each its own pass with its own statistics."""
        features1 = self.encoder(view1)
        features2 = self.encoder(view2)
        prediction1 = self.predictor(self.projector(features1))
        prediction2 = self.predictor(self.projector(features2))
        return Predictions(prediction1, prediction2, features1.detach())


class Target(nn.Module):
    """The target network xi: a copy of the online encoder and projector that follows by EMA, not by gradient.

    It stays in train mode whatever is asked of it: batch norm uses the batch's statistics, as the reference.
    """

    def __init__(self, online: Online) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(online.encoder)
        self.projector = copy.deepcopy(online.projector)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "Target":
        return super().train(True)

    @torch.no_grad()
    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Projections (N, D) of both views, each view its own pass."""
        return self.projector(self.encoder(view1)), self.projector(self.encoder(view2))


class BYOL(nn.Module):
    """Online and target network; at the start they are equal.

    Args:
        encoder: (N, ...) -> (N, num_features), with the attribute `num_features` (see `make_encoder`).
        projector_hidden: width of the projector's hidden layer.
        projector_size: dimension D of projections and predictions.
        predictor_hidden: width of the predictor's hidden layer.
        predictor: whether there is a predictor at all; without it BYOL collapses (paper, table 5b).
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector_hidden: int,
        projector_size: int,
        predictor_hidden: int,
        predictor: bool = True,
    ) -> None:
        super().__init__()
        projector = MLP(int(encoder.num_features), projector_hidden, projector_size)  # type: ignore[arg-type]
        head = MLP(projector_size, predictor_hidden, projector_size) if predictor else nn.Identity()
        self.online = Online(encoder, projector, head)
        self.target = Target(self.online)

    def ema_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """The lists (target, online) of paired parameters, for `ema_update_`; without batch-norm buffers."""
        online = dict(self.online.named_parameters())
        target = dict(self.target.named_parameters())
        return list(target.values()), [online[name] for name in target]


def make_byol(settings: ModelConfig) -> BYOL:
    """The networks of a run; weights are drawn from torch's global generator."""
    return BYOL(
        make_encoder(settings.backbone, settings.stem),
        settings.projector_hidden,
        settings.projector_size,
        settings.predictor_hidden,
        settings.predictor,
    )


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the normalised vectors, 2 - 2 cos (paper, eq. 2), in float32 at least.

    Written as a difference, as the reference does: close to 0 it keeps the digits that 2 - 2 cos would lose.

    Args:
        prediction: (N, D) floating point.
        target: (N, D) floating point.

    Returns:
        (N,) in [0, 4]; float32, or float64 for float64.
    """
    return (l2_normalize(prediction) - l2_normalize(target)).square().sum(dim=-1)


def l2_normalize(x: Tensor) -> Tensor:
    """Rows (N, D) scaled to length 1, in float32 at least; rows shorter than 1e-6 by 1e6 (reference)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * x.square().sum(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()


def byol_loss(online: Predictions, projection1: Tensor, projection2: Tensor) -> Tensor:
    """Both directions summed, mean over the batch (paper, sec. 3.1): 0-dim, about 4 at the start."""
    return (
        regression_loss(online.prediction1, projection2) + regression_loss(online.prediction2, projection1)
    ).mean()
