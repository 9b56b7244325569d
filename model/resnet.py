"""The encoders: torchvision's ResNets and the small resnet8 and resnet8_half, with the reference's initialization.

Those of timm come from timm_networks.py.
"""

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from byolt.configs.schema import TIMM, Backbone, Stem
from byolt.model.kernels.norm import BatchNorm
from byolt.model.timm_networks import make_timm_encoder

BACKBONES: tuple[str, ...] = get_args(Backbone)
STEMS: tuple[str, ...] = get_args(Stem)


class BasicBlock(resnet.BasicBlock):
    """torchvision's, with each batch norm fused with the operations after it."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(out), *_shortcut(self, x), relu=True)


class Bottleneck(resnet.Bottleneck):
    """torchvision's, with each batch norm fused with the operations after it."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        return self.bn3(self.conv3(out), *_shortcut(self, x), relu=True)


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> tuple[Tensor, BatchNorm | None]:
    """The tensor that a block adds to its output, and the batch norm to apply to it, if there is one."""
    if block.downsample is None:
        return x, None
    convolution, norm = block.downsample
    return convolution(x), norm


class ResNet(resnet.ResNet):
    """torchvision's, with each batch norm fused with the operations after it."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, 512) from basic blocks, (N, 2048) from bottlenecks."""
        x = self.bn1(self.conv1(x), relu=True, pool=self.maxpool)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ResNet8(nn.Module):
    """The CIFAR ResNet of He et al. (arXiv 1512.03385, sec. 4.2) with n = 1; its widths there are 16-32-64.

    Attribute names are those of torchvision's ResNet; shortcuts that change the shape are 1x1 convolutions (option B),
    as in torchvision's blocks.

    Args:
        width: channels of the first stage: 32 (0.31 M parameters) or 16 (0.08 M).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(width, width, norm_layer=BatchNorm))
        self.layer2 = nn.Sequential(_halving_block(width, 2 * width))
        self.layer3 = nn.Sequential(_halving_block(2 * width, 4 * width))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, 4 * width)."""
        x = self.bn1(self.conv1(images), relu=True, pool=self.maxpool)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _halving_block(channels_in: int, channels_out: int) -> BasicBlock:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=2, bias=False)
    shortcut = nn.Sequential(convolution, BatchNorm(channels_out))
    return BasicBlock(channels_in, channels_out, stride=2, downsample=shortcut, norm_layer=BatchNorm)


# Channels of the first stage.
RESNET8_WIDTHS = {"resnet8": 32, "resnet8_half": 16}

# Block, blocks of each stage, width of a bottleneck relative to ResNet-50's 64, as in torchvision.
_RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), 128),
}


def make_encoder(backbone: str, stem: str, size: int = 224) -> nn.Module:
    """Makes an encoder with random weights: a network without its classifier.

    Args:
        backbone: one of BACKBONES, or timm:NAME (`make_timm_encoder`). The ResNets are v1.5: a bottleneck strides in
            its 3x3 convolution.
        stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no max-pool; SimCLR,
            arXiv 2002.05709, App. B.9).
        size: side of the images in pixels. It matters only to timm's models.

    Returns:
        A module with the attribute `num_features`: images (N, 3, H, W) -> (N, num_features) after global
        average pooling. Its state_dict has torchvision's keys without `fc.*`, or timm's without the classifier's.

    Raises:
        ValueError: backbone or stem is unknown, or timm cannot build the model.
    """
    if backbone.startswith(TIMM):
        return make_timm_encoder(backbone, size)
    if backbone not in BACKBONES:
        raise ValueError(f"backbone {backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
    if stem not in STEMS:
        raise ValueError(f"stem {stem!r} is unknown; choose one of {', '.join(STEMS)}")
    if backbone in RESNET8_WIDTHS:
        encoder: Any = ResNet8(RESNET8_WIDTHS[backbone])
    else:
        block, blocks, width = _RESNETS[backbone]
        encoder = ResNet(block, list(blocks), width_per_group=width, norm_layer=BatchNorm)
    encoder.num_features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "cifar":
        width = encoder.conv1.out_channels
        encoder.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
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
