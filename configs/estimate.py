"""Estimates the memory and the time of a run from counted sizes and measured rates, without importing torch."""

import math
from typing import NamedTuple

from byolt.configs.schema import Config
from byolt.files.console import duration
from byolt.files.machine import Device

GIB = 2**30


class Cost(NamedTuple):
    """Sizes of an encoder, counted by torch at 96 px; a test counts them again."""

    parameters: int
    features: int
    bytes16: float  # that the forward pass keeps for the backward pass, per pixel of a view, in 16 bits
    bytes32: float  # the same in 32 bits
    flops: float  # of a forward pass, per pixel of a view; a multiply-add counts as two


COSTS = {  # by model.backbone and model.stem
    ("resnet8", "imagenet"): Cost(311200, 128, 89.3, 162.3, 8240),
    ("resnet8_half", "imagenet"): Cost(79312, 64, 47.6, 87.1, 2648),
    ("resnet18", "imagenet"): Cost(11176512, 512, 239.1, 444.1, 72288),
    ("resnet34", "imagenet"): Cost(21284672, 512, 340.7, 645.7, 146016),
    ("resnet50", "imagenet"): Cost(23508032, 2048, 883.5, 1723.5, 162912),
    ("resnet101", "imagenet"): Cost(42500160, 2048, 1302.9, 2550.9, 310880),
    ("resnet152", "imagenet"): Cost(58143808, 2048, 1816.9, 3568.9, 458848),
    ("wide_resnet50_2", "imagenet"): Cost(66834240, 2048, 1148.8, 2250.8, 454240),
    ("resnet8", "cifar"): Cost(307360, 128, 630.3, 1260.3, 95936),
    ("resnet8_half", "cifar"): Cost(77392, 64, 318.1, 636.1, 24416),
    ("resnet18", "cifar"): Cost(11168832, 512, 2296.1, 4590.1, 1084800),
    ("resnet34", "cifar"): Cost(21276992, 512, 3897.7, 7791.7, 2264448),
    ("resnet50", "cifar"): Cost(23500352, 2048, 12465.5, 24919.5, 2534784),
    ("resnet101", "cifar"): Cost(42492480, 2048, 19004.9, 37986.9, 4902272),
    ("resnet152", "cifar"): Cost(58136128, 2048, 27078.9, 54124.9, 7269760),
    ("wide_resnet50_2", "cifar"): Cost(66826560, 2048, 16660.8, 33312.8, 7196032),
}


class Rate(NamedTuple):
    """A speed of `train.py`, measured or estimated."""

    device: str  # a GPU's name, or "cpu"
    backbone: str
    stem: str
    size: int  # of a view, in pixels
    precision: str
    images_per_second: float  # of one GPU, or of `cores` CPU cores
    cores: int
    source: str
    by_cpu_time: bool = False  # estimated from CPU time on busy cores, instead of measured on quiet ones


RATES = [
    Rate("NVIDIA H200", "resnet50", "imagenet", 224, "bf16", 1411, 0, "one NVIDIA H200, commit 20cdd17"),
    Rate("NVIDIA H200", "resnet18", "cifar", 32, "bf16", 8000, 0, "one NVIDIA H200, commit 20cdd17"),
    # CPU s an image: 0.065 (resnet18), 0.006 to 0.009 (resnet8), 0.00077 (resnet8_half, the quickstart's steps 30 to
    # 330 on one thread); the rates have a margin of a fifth to a half.
    Rate("cpu", "resnet8", "imagenet", 96, "fp32", 100, 2, "2 cores of an AMD EPYC 9005", by_cpu_time=True),
    Rate("cpu", "resnet18", "imagenet", 96, "fp32", 25, 2, "2 cores of an AMD EPYC 9005", by_cpu_time=True),
    Rate(
        "cpu", "resnet8_half", "cifar", 16, "fp32", 1300, 2, "2 cores of an AMD EPYC 9005", by_cpu_time=True
    ),
    Rate("cpu", "resnet8", "cifar", 24, "fp32", 320, 2, "2 cores of an AMD EPYC 9005"),
    Rate("cpu", "resnet8", "cifar", 32, "bf16", 345, 2, "2 cores of an AMD EPYC 9005"),
]
# Libraries: a process on a CPU (runs of ResNet-18 at 96 px had 1.40 and 2.47 GiB resident at batches 16 and 128, the
# sum is 1.4 and 2.4); CUDA's context and the decoder's buffers (not yet measured).
_LIBRARIES = {"cpu": 1.0 * GIB, "cuda": 2 * GIB}


# A step takes at least this many seconds: torch's calls. cpu: resnet8_half with 16 images of 16 px, 30 steps on two
# busy cores, took 46 CPU ms (stem imagenet, wall time from 25 ms). cuda: resnet18 at 32 px kept an H200's host for 62.
_FLOOR = {"cpu": 0.04, "cuda": 0.06}
# And seconds for each byte of `Memory.weights` that the update reads and writes: on the same cores heads of 32,768
# units (8.7 million parameters) took 182 ms more than those of 256. cuda: not yet measured.
_UPDATE = {"cpu": 8e-10, "cuda": 0.0}


class Memory(NamedTuple):
    """Bytes that one rank needs."""

    weights: float  # parameters, gradients, momenta, target network and the update's temporary tensors
    activations: float  # of one image's two views, kept for the backward pass
    views: float  # one image's two views, in the training step, in the loader and prepared ahead
    libraries: float

    def total(self, images: int) -> float:
        """Bytes for micro-batches of this many images per rank."""
        return self.weights + self.libraries + images * (self.activations + self.views)

    def largest(self, available: int) -> int:
        """Images in the largest micro-batch that fits, 0 if none does; from 8 on a multiple of 8."""
        rest = available - self.weights - self.libraries
        images = max(0, int(rest / (self.activations + self.views)))
        return images - images % 8 if images > 8 else images


def is_known(config: Config) -> bool:
    """Whether the encoder's sizes were counted: not those of timm's models."""
    return (config.model.backbone, config.model.stem) in COSTS


def memory(config: Config, kind: str) -> Memory:
    """Memory of a run on a "cpu" or "cuda" device; decoded images that data.resident keeps are not included."""
    model, cost = config.model, COSTS[config.model.backbone, config.model.stem]
    projector = model.projector_hidden * (cost.features + 3 + model.projector_size)
    predictor = model.predictor_hidden * (2 * model.projector_size + 3) * model.predictor
    target = cost.parameters + projector
    online = target + predictor
    half = config.train.precision_on(kind) != "fp32"
    pixels = 2 * config.augment.size**2
    weights = 4 * (3 * online + target)  # parameter, gradient, momentum, target
    weights += 2 * (online + target) * half  # autocast's copies
    weights += 8 * online * (kind == "cpu")  # update and step of the back end foreach
    width = 2 if half and kind == "cuda" else 4
    return Memory(
        weights,
        pixels * (cost.bytes16 if half else cost.bytes32),
        pixels * 3 * width * (config.data.prefetch + 3),
        _LIBRARIES[kind],
    )


def memory_line(config: Config, device: Device, ranks: int, num_images: float = math.inf) -> str:
    """The memory that a rank needs, what there is, and the largest batch of the data set's images that fits."""
    if not is_known(config):
        return f"not yet measured for model.backbone={config.model.backbone}"
    need, images = memory(config, device.kind), config.images_per_rank(ranks)
    largest = need.largest(device.memory)
    batch = largest * ranks * config.train.accumulation
    fits = f"largest that fits: train.batch_size={batch}" if largest >= 2 else "no batch fits"
    if largest >= 2 and batch >= num_images:
        fits = f"a batch of all {num_images:,} images fits"
    if 2 <= largest < images:
        fits = f"does not fit; {fits}, or train.accumulation={fitting_accumulation(config, device, ranks)}"
    each = " per rank" if ranks > 1 else ""
    return (
        f"about {need.total(images) / GIB:.1f} of {device.memory / GIB:.1f} GiB{each} (activations "
        f"{images * need.activations / GIB:.1f}, weights {need.weights / GIB:.1f}, views "
        f"{images * need.views / GIB:.1f}, libraries {need.libraries / GIB:.1f}); {fits}"
    )


def expect(config: Config, device: Device, ranks: int, steps: int) -> list[str]:
    """Lines for the start of a run: the device, the time of the steps, and a lack of memory."""
    lines = [f"{device}: {time_line(config, device, ranks, steps)}"]
    if not is_known(config):
        return lines
    if memory(config, device.kind).largest(device.memory) < config.images_per_rank(ranks):
        lines.append(f"warning: memory: {memory_line(config, device, ranks)}")
    return lines


def fitting_accumulation(config: Config, device: Device, ranks: int, above: int = 0) -> int:
    """The smallest train.accumulation over `above` whose micro-batches fit; the largest possible one if none fits.

    Every micro-batch counts as fitting if the encoder's sizes are unknown.
    """
    each = config.train.batch_size // ranks
    largest = memory(config, device.kind).largest(device.memory) if is_known(config) else each
    possible = [parts for parts in range(1, each // 2 + 1) if each % parts == 0]
    fitting = (parts for parts in possible if parts > above and each // parts <= largest)
    return next(fitting, max(possible, default=1))


def time_line(config: Config, device: Device, ranks: int, steps: int) -> str:
    """The time that the steps take, and where the figure comes from."""
    if not is_known(config):
        return f"not yet measured for model.backbone={config.model.backbone}"
    bits, images = config.train.precision_on(device.kind), steps * config.train.batch_size / ranks
    place = device.name if device.kind == "cuda" else "cpu"
    known = [rate for rate in RATES if rate.device in place and rate.precision == bits]
    unknown = f"not yet measured in {bits} on {device.name}"
    if not known and device.kind == "cuda":
        known = [rate for rate in RATES if rate.device == "NVIDIA H200" and rate.precision == bits]
    if not known:
        return unknown
    asked = config.model.backbone, config.model.stem, config.augment.size
    rate = min(known, key=lambda r: abs(math.log(_flops(r.backbone, r.stem, r.size) / _flops(*asked))))
    scale = _asked_flops(config) / _flops(rate.backbone, rate.stem, rate.size)
    if rate.cores:
        compute = rate.cores / rate.images_per_second - _data_seconds(rate.size)
        each = (compute * scale + _data_seconds(config.augment.size)) / device.cores
    else:
        each = scale / rate.images_per_second
    batch = config.train.batch_size / ranks
    # Seconds that a step of any batch takes: torch's calls and the update of the weights.
    floor = _FLOOR[device.kind] + _UPDATE[device.kind] * memory(config, device.kind).weights
    speed = batch / max(each * batch, floor)
    same = (rate.backbone, rate.stem, rate.size) == asked
    kind = "estimated from CPU time" if rate.by_cpu_time else "measured"
    how = kind if same else f"scaled from {rate.backbone} at {rate.size} px, {kind}"
    if each * batch < floor:
        how = f"a step takes at least {1000 * floor:,.0f} ms, {how}"
    takes = f"about {duration(images / speed)}"
    if rate.device not in place:
        return f"{unknown}; {takes} on one {rate.device} for each rank"
    speed *= ranks
    figure = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
    return f"{takes} at {figure} images/s ({how} on {rate.source})"


def _data_seconds(size: int) -> float:
    """CPU seconds that decoding and both views of an image take: 2 ms at 224 px, 0.07 ms at 32 (docs/benchmarks.md)."""
    return 3e-5 + 4e-8 * size**2


def _asked_flops(config: Config) -> float:
    """FLOPs of a forward pass of one view; heads below a tenth of the encoder's are part of the measured rates."""
    model = config.model
    encoder = _flops(model.backbone, model.stem, config.augment.size)
    features = COSTS[model.backbone, model.stem].features
    heads = 2 * model.projector_hidden * (features + model.projector_size)
    heads += 4 * model.predictor_hidden * model.projector_size * model.predictor
    return encoder + (heads if heads > encoder / 10 else 0)


def _flops(backbone: str, stem: str, size: int) -> float:
    return COSTS[backbone, stem].flops * size**2
