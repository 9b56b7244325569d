"""The encoders: torchvision's ResNets and the small resnet8, with the reference's initialization."""

import math
from typing import get_args

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from byolt.configs.schema import Backbone, Stem

BACKBONES: tuple[str, ...] = get_args(Backbone)
STEMS: tuple[str, ...] = get_args(Stem)


class ResNet8(nn.Module):
    """The CIFAR ResNet of He et al. (arXiv 1512.03385, sec. 4.2) with n = 1 and twice the width: 32-64-128.

    0.31 M parameters. Attribute names are those of torchvision's ResNet; shortcuts that change the shape are 1x1
    convolutions (option B), as in torchvision's blocks.
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


def make_encoder(backbone: str, stem: str) -> nn.Module:
    """Makes an encoder with random weights: a ResNet without its classifier.

    Args:
        backbone: one of BACKBONES. The ResNets are v1.5: a bottleneck strides in its 3x3 convolution.
        stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no max-pool; SimCLR,
            arXiv 2002.05709, App. B.9).

    Returns:
        A module with the attribute `num_features`: images (N, 3, H, W) -> (N, num_features) after global
        average pooling. Its state_dict has torchvision's keys without `fc.*`.

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
    return initialize_(encoder)


def initialize_(module: nn.Module) -> nn.Module:
    """Initializes a module in place as the reference does (haiku's defaults, which DeepMind's `byol/` keeps).

    Weights of convolutions and linear layers: normal with standard deviation s = 1 / sqrt(fan in), truncated at 2 s.
    Biases: 0. Batch norm: scale 1 and bias 0, but scale 0 in the last one of a bottleneck (not of a basic block).
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
