"""Measures each stage alone: reading, sampling parameters, decoding, the parts of the views, the transfer.

    read          reads the images with data.threads threads, as the loader does; checks headers in one thread
    draw          samples ids and the parameters of their views, one thread
    decode        the back end with views of 8 px and no operation
    crop + resize views of full size without operations, minus decode; includes flip, normalization and output
    color         the same with jitter and gray, minus the line above
    blur          the same with blur, minus the line above
    solarize      the same with solarize, which is the whole back end, minus the line above
    hand-over     moves the finished batch to the step's device, dtype and memory layout

A back end makes both views in one call, so the cost of a part is the difference between two calls on the same images,
of which the second has one more operation. Normalization cannot be switched off. On a busy machine a small difference
can be negative.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from byolt.configs.schema import Config
from byolt.pipelines import order
from byolt.pipelines.backends import make_backend
from byolt.pipelines.sources import ParallelReader, Source
from byolt.pipelines.views import ViewParams, draw_both

SMALL = 8  # pixels: the smallest augment.size, so that decoding is almost all of the cost
OPERATIONS = ("jitter", "gray", "blur", "solarize")
PARTS = {
    "crop + resize": (),
    "color": ("jitter", "gray"),
    "blur": ("jitter", "gray", "blur"),
    "solarize": OPERATIONS,
}
STAGES = ("read", "draw", "decode", *PARTS, "hand-over")


@dataclass(frozen=True)
class Cost:
    """Time per image, which is both its views."""

    wall_ms: float
    cpu_ms: float  # of all threads of the process
    gpu_us: float | None = None  # between two events on the stream, waits included; None without a GPU

    def __sub__(self, other: "Cost") -> "Cost":
        gpu = None if self.gpu_us is None or other.gpu_us is None else self.gpu_us - other.gpu_us
        return Cost(self.wall_ms - other.wall_ms, self.cpu_ms - other.cpu_ms, gpu)

    @property
    def images_per_s(self) -> float | None:
        """None if the time, a difference, is not positive."""
        return 1000 / self.wall_ms if self.wall_ms > 0 else None


def rate(images_per_s: float | None) -> str:
    """The rate as text."""
    if images_per_s is None:
        return "-"
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def table(costs: dict[str, Cost]) -> str:
    """A heading and one line for each cost."""
    lines = [f"{'':14} {'images/s':>9} {'CPU ms':>8} {'GPU µs':>8}   per image"]
    for name, cost in costs.items():
        gpu = f"{cost.gpu_us:,.1f}" if cost.gpu_us is not None else "-"
        lines.append(f"{name:14} {rate(cost.images_per_s):>9} {cost.cpu_ms:>8.3f} {gpu:>8}")
    return "\n".join(lines)


class Clock:
    """Adds up the time of all `measure` blocks."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.wall = self.cpu = self.gpu = 0.0  # seconds
        self.images = 0

    @contextmanager
    def measure(self, images: int) -> Iterator[None]:
        """Times the block, which handles this number of images; waits for the GPU before and after."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self._on_gpu:
            end.record()
            torch.cuda.synchronize()
            self.gpu += begin.elapsed_time(end) / 1000
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.images += images

    def cost(self) -> Cost:
        gpu_us = 1e6 * self.gpu / self.images if self._on_gpu else None
        return Cost(1000 * self.wall / self.images, 1000 * self.cpu / self.images, gpu_us)


def only(params: ViewParams, operations: tuple[str, ...]) -> ViewParams:
    """The parameters with only these of OPERATIONS applied."""
    off = {name: np.zeros_like(getattr(params, name)) for name in OPERATIONS if name not in operations}
    return replace(params, **off)


def measure_stages(
    config: Config, source: Source, device: torch.device, dtype: torch.dtype, batches: int
) -> dict[str, Cost]:
    """Measures every stage of STAGES on the first batches of a run, after one more that builds and compiles.

    `device` and `dtype` are those of the step's views.

    Raises:
        ValueError: an image is damaged; names it.
    """
    augment, seed, size = config.augment, config.run.seed, config.train.batch_size
    small = config.model_copy(update={"augment": augment.model_copy(update={"size": SMALL})})
    backend, _ = make_backend(config, device, dtype)
    decode, _ = make_backend(small, device, dtype)
    reader = ParallelReader(source, config.data.threads)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    for number in range(batches + 1):
        if number <= 1:  # the first batch is not counted
            clocks = {name: Clock(device) for name in STAGES}
        with clocks["draw"].measure(size):
            epoch, step = order.position(number, len(source), size)
            ids = order.global_batch(seed, epoch, step, len(source), size, config.data.order)
            sides = source.heights[ids], source.widths[ids]
            drawn = draw_both(augment, seed, epoch, ids, *sides)
        with clocks["read"].measure(size):
            encoded = [_sound(source, *read) for read in zip(ids.tolist(), reader(ids.tolist()), strict=True)]
        bare = [only(params, ()) for params in drawn]
        decode(encoded, *bare)  # not counted: cold caches cost 0.2 ms per image
        with clocks["decode"].measure(size):
            decode(encoded, *bare)
        made = backend(encoded, *bare)  # not counted either
        for name, operations in PARTS.items():
            del made  # so that the back end can reuse its memory, as in training
            params = [only(view, operations) for view in drawn]
            with clocks[name].measure(size):
                made = backend(encoded, *params)
        with clocks["hand-over"].measure(size):
            handed = [view.to(device, dtype).contiguous(memory_format=layout) for view in made]
        del made, handed
    reader.close()
    costs = {name: clock.cost() for name, clock in clocks.items()}
    return costs | differences({name: costs[name] for name in ("decode", *PARTS)})


def differences(cumulative: dict[str, Cost]) -> dict[str, Cost]:
    """Each cost minus the one before it; the first as it is."""
    names, costs = list(cumulative), list(cumulative.values())
    parts = [costs[0], *(later - earlier for earlier, later in pairwise(costs))]
    return dict(zip(names, parts, strict=True))


def _sound(source: Source, i: int, data: bytes | ValueError) -> bytes:
    if isinstance(data, bytes):
        return data
    raise ValueError(f"{source.describe(i)}: {data}; find all of them with tools/verify_shards.py")
