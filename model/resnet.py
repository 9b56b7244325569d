"""The encoders: ResNets and the small resnet8 and resnet8_half, with the reference's initialization.

The ResNets have the attributes and, from a seed, the weights of subclasses of torchvision's, which are not imported:
torchvision imports torch's compiler, in 1.2 CPU s. Those of timm come from timm_networks.py.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from byolt.configs.schema import TIMM, Backbone, Stem
from byolt.model.kernels.norm import BatchNorm
from byolt.model.timm_networks import make_timm_encoder

BACKBONES: tuple[str, ...] = get_args(Backbone)
STEMS: tuple[str, ...] = get_args(Stem)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each batch norm fused with the operations after it.

    Args:
        channels_in: channels of the input.
        channels: channels of the output, divided by `expansion`.
        stride: of the first 3x3 convolution.
        downsample: 1x1 convolution and batch norm of the shortcut; None adds the input itself.
        width: of a bottleneck relative to ResNet-50's 64; a basic block has none.
    """

    expansion = 1

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Sequential | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(channels_in, channels, 3, stride)
        self.bn1 = BatchNorm(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = BatchNorm(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(out), *_shortcut(self, x), relu=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 one strides (v1.5). Otherwise as `BasicBlock`."""

    expansion = 4

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Sequential | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        inner = channels * width // 64
        self.conv1 = _convolution(channels_in, inner, 1)
        self.bn1 = BatchNorm(inner)
        self.conv2 = _convolution(inner, inner, 3, stride)
        self.bn2 = BatchNorm(inner)
        self.conv3 = _convolution(inner, 4 * channels, 1)
        self.bn3 = BatchNorm(4 * channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        return self.bn3(self.conv3(out), *_shortcut(self, x), relu=True)


def _convolution(channels_in: int, channels_out: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, side, stride, padding=side // 2, bias=False)


def _stage(
    block: type[BasicBlock | Bottleneck],
    channels_in: int,
    channels: int,
    count: int,
    stride: int,
    width: int = 64,
) -> nn.Sequential:
    """`count` blocks; the first strides, and its shortcut is a 1x1 convolution if the shape changes (option B)."""
    channels_out, downsample = channels * block.expansion, None
    if stride > 1 or channels_in != channels_out:
        downsample = nn.Sequential(
            _convolution(channels_in, channels_out, 1, stride), BatchNorm(channels_out)
        )
    first = block(channels_in, channels, stride, downsample, width)
    return nn.Sequential(first, *(block(channels_out, channels, width=width) for _ in range(count - 1)))


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> tuple[Tensor, BatchNorm | None]:
    """The tensor that a block adds to its output, and the batch norm to apply to it, if there is one."""
    if block.downsample is None:
        return x, None
    convolution, norm = block.downsample
    return convolution(x), norm  # type: ignore[return-value]


class ResNet(nn.Module):
    """The ResNet of He et al. (arXiv 1512.03385) for ImageNet; a bottleneck's width is relative to ResNet-50's 64."""

    def __init__(self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv1 = _convolution(3, 64, 7, stride=2)
        self.bn1 = BatchNorm(64)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, blocks[0], 1, width)
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], 2, width)
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], 2, width)
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], 2, width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(512 * block.expansion, 1000)
        # `initialize_` replaces the values, but a seed's next numbers depend on them.
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

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
        self.conv1 = _convolution(3, width, 7, stride=2)
        self.bn1 = BatchNorm(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(BasicBlock, width, width, 1, 1)
        self.layer2 = _stage(BasicBlock, width, 2 * width, 1, 2)
        self.layer3 = _stage(BasicBlock, 2 * width, 4 * width, 1, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, 4 * width)."""
        x = self.bn1(self.conv1(images), relu=True, pool=self.maxpool)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


# Channels of the first stage.
RESNET8_WIDTHS = {"resnet8": 32, "resnet8_half": 16}

# Block, blocks of each stage, width of a bottleneck relative to ResNet-50's 64, as in torchvision.
_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, ...], int]] = {
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
        encoder = ResNet(block, blocks, width)
    encoder.num_features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = _convolution(3, encoder.conv1.out_channels, 3)
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
